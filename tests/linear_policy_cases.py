"""What the tests of linear_policy_loss share: batches, chunks of 4 rows, one floor against the
float64 reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyllmtune import linear_policy_loss
from pyllmtune.losses.metrics import MAXIMA, SUMS
from pyllmtune.ops import linear_policy_blocks as blocks
from tests import helpers

# losses are sums of e^r of log-probs with the error of linear_token_logprobs, 1e-5
VALUES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-5,
    torch.float16: 2e-5,
}


def batch(
    B: int = 3, T: int = 4, D: int = 9, V: int = 300, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Old log-probs near the policy's, so that some ratios are clipped and others are not."""
    hidden = torch.randn(B, T, D).to(dtype)
    weight = (torch.randn(V, D) * 2 / D**0.5).to(dtype)
    tokens = torch.randint(0, V, (B, T))
    logprobs = (hidden.double() @ weight.double().T).log_softmax(-1)
    old = logprobs.gather(-1, tokens[..., None])[..., 0] + 0.3 * torch.randn(B, T)
    return {
        "hidden": hidden,
        "weight": weight,
        "tokens": tokens,
        "old_logprobs": old.float(),
        "advantages": torch.randn(B),
        "mask": torch.rand(B, T) > 0.3,
        "ref_logprobs": (old + 0.2 * torch.randn(B, T)).float(),
        "weights": torch.rand(B, T) * (torch.rand(B, T) > 0.1),
    }


def leaves_of(data: dict[str, Tensor]) -> list[str]:
    return [name for name in ("hidden", "weight", "bias") if name in data]


def run(data: dict[str, Tensor], backend: str, function=linear_policy_loss, **options):
    """Loss, metrics, and gradients of 1.5 times the loss."""
    names = leaves_of(data)
    leaves = {name: data[name].detach().clone().requires_grad_() for name in names}
    out = function(**{**data, **leaves}, backend=helpers.use(backend), **options)
    grads = torch.autograd.grad(1.5 * out.loss, list(leaves.values()))
    return out.loss.detach(), out.metrics.vector, grads


def wide(data: dict) -> dict:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in data.items()
    }


def compare(data: dict[str, Tensor], backend: str, **options) -> tuple[Tensor, ...]:
    dtype = data["hidden"].dtype
    loss, metrics, grads = run(data, backend, **options)
    options.pop("workspace_bytes", None)
    want, expected, truth = run(wide(data), "reference", **wide(options))
    assert loss.dtype == helpers.accumulator(dtype)
    helpers.assert_close(loss, want, VALUES[dtype], "loss")
    tokens = expected[0].clamp(min=1)  # sums as the means that to_dict makes of them
    for slot, a, b in zip(SUMS + MAXIMA, metrics, expected, strict=True):
        count = tokens if slot in SUMS else 1
        helpers.assert_close(a[None] / count, b[None] / count, VALUES[dtype], slot)
    for name, grad, right in zip(leaves_of(data), grads, truth, strict=True):
        assert grad.dtype == data[name].dtype
        size = right.abs().max().clamp(min=1e-300)  # of its own, so that none passes by being small
        # the gradient of the logits is rounded to the operands' dtype, then the sum
        bound = 2 * helpers.BACKWARD[dtype]
        helpers.assert_close(grad.double() / size, right / size, bound, f"gradient of {name}")
    return grads


def workspace(data: dict[str, Tensor], rows: int) -> int:
    """So that this many rows are taken at a time."""
    hidden, vocab = data["hidden"], data["weight"].shape[0]
    return rows * blocks.row_bytes(vocab, hidden.device, hidden.dtype)


def small_chunks(monkeypatch) -> list[int]:
    """Chunks of 4 rows instead of 512, so that small batches take several; counts what ran."""
    monkeypatch.setattr(blocks, "CHUNK_ROWS", 4)
    seen = []
    sizes = blocks._Gradients.add

    def add(self, logits, *rest):
        seen.append(logits.shape[0])
        return sizes(self, logits, *rest)

    monkeypatch.setattr(blocks._Gradients, "add", add)
    for word in ("linear_policy_loss", "linear_token_logprobs"):
        monkeypatch.setattr(f"pyllmtune.ops.{word}.check_workspace", lambda *_: 1 << 25)
    return seen
