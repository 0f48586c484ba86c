"""linear_policy_loss: a loss and its gradients in hidden states and weight, beside our two
functions one after the other ("linear_token_logprobs") and eager torch, which holds the logits.

"matmul" runs the three products that must be, in the operands' dtype, with torch's. A tenth of the
tokens are masked and a fifth of the answers have advantage 0, as groups of equal rewards have. The
peak memory of each provider is in its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_linear_token_logprobs import ROWS, WIDTH, matmuls
from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import PolicyLossConfig, linear_policy_loss, linear_token_logprobs, policy_loss

OP = "linear_policy_loss"
ANSWERS = 8
CHUNK = 64  # rows: bounds the memory of the float64 reference
CONFIGS = {
    "token level": PolicyLossConfig(entropy_coef=0.01),
    "sequence level": PolicyLossConfig(level="sequence", aggregation="seq-mean-token-mean"),
}

# (inputs, hidden, weight) -> loss
Loss = Callable[["Inputs", Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    tokens: Tensor  # [B, T]
    old_logprobs: Tensor  # [B, T]
    advantages: Tensor  # [B]
    mask: Tensor  # [B, T]

    @property
    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.old_logprobs, self.advantages, self.mask


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    rows, width, vocab = shape
    where: dict[str, Any] = {"device": device, "generator": generator}
    size = (ANSWERS, rows // ANSWERS)
    hidden = torch.randn(*size, width, **where).to(dtype)
    weight = torch.empty(vocab, width, dtype=dtype, device=device)
    weight.normal_(0, 3 / width**0.5, generator=generator)
    tokens = torch.randint(vocab, size, **where)
    with torch.no_grad():
        old = linear_token_logprobs(hidden, weight, tokens).logprobs
    old = old + 0.2 * torch.randn(size, **where)
    advantages = torch.randn(ANSWERS, **where)
    advantages[: ANSWERS // 5] = 0.0
    return Inputs(hidden, weight, tokens, old, advantages, torch.rand(size, **where) > 0.1)


def of_scores(config: PolicyLossConfig, inputs: Inputs, logprobs: Tensor, entropy: Tensor):
    return policy_loss(logprobs, *inputs.constants, entropy=entropy, config=config)


def ours(config: PolicyLossConfig, backend: str, inputs: Inputs, hidden: Tensor, weight: Tensor):
    given = (hidden, weight, inputs.tokens, *inputs.constants)
    return linear_policy_loss(*given, config=config, backend=backend).loss


def two_functions(config: PolicyLossConfig, inputs: Inputs, hidden: Tensor, weight: Tensor):
    scores = linear_token_logprobs(hidden, weight, inputs.tokens, mask=inputs.mask)
    return of_scores(config, inputs, scores.logprobs, scores.entropy).loss


def eager(config: PolicyLossConfig, inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    # float32: logits of bfloat16 clip other tokens, so that their gradients cannot be compared
    logprobs = (hidden.float() @ weight.float().T).log_softmax(-1)
    chosen = logprobs.gather(-1, inputs.tokens[..., None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return of_scores(config, inputs, chosen, entropy).loss


def run(loss: Loss, inputs: Inputs) -> Results:
    hidden, weight = (x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight))
    value = loss(inputs, hidden, weight)
    by_hidden, by_weight = torch.autograd.grad(value, (hidden, weight))
    return {"loss": value, "hidden": by_hidden.flatten(0, 1), "weight": by_weight}


def bare(inputs: Inputs) -> Results:
    flat = inputs.hidden.flatten(0, 1)
    return matmuls(True, type("Flat", (), {"hidden": flat, "weight": inputs.weight}))


def reference(config: PolicyLossConfig, inputs: Inputs) -> Results:
    """In float64: scores by chunks, their gradients from the loss, then by chunks back."""
    weight = inputs.weight.double().requires_grad_()
    hidden, tokens = inputs.hidden.double().flatten(0, 1), inputs.tokens.flatten()
    parts = torch.arange(len(tokens), device=tokens.device).split(CHUNK)

    def scores(part: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return linear_token_logprobs(x, weight, tokens[part], backend="reference")[:2]

    with torch.no_grad():
        found = [scores(part, hidden[part]) for part in parts]
        whole = [torch.cat(values) for values in zip(*found, strict=True)]
    leaves = [value.view(inputs.tokens.shape).requires_grad_() for value in whole]
    constants = [v.double() if v.is_floating_point() else v for v in inputs.constants]
    out = policy_loss(leaves[0], *constants, entropy=leaves[1], config=config, backend="reference")
    upstream = [grad.flatten() for grad in torch.autograd.grad(out.loss, leaves)]
    by_hidden, by_weight = [], torch.zeros_like(weight)
    for part in parts:
        x = hidden[part].requires_grad_()
        grads = [value[part] for value in upstream]
        found = torch.autograd.grad(scores(part, x), (x, weight), grads)
        by_hidden.append(found[0])
        by_weight += found[1]
    return {"loss": out.loss.detach(), "hidden": torch.cat(by_hidden), "weight": by_weight}


def cases(options: Options) -> Iterator[Case]:
    standard = (ROWS * options.rows, WIDTH, options.vocab)

    def case(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
        config = CONFIGS[name.split(",")[0]]
        # the logits' gradient is rounded, and then a sum
        two = 1.0 if dtype == torch.float32 else 2.0
        table: dict[str, Provider] = {}
        for backend in our_backends(options.device, dtype):
            word = f"pyllmtune {backend}"
            loss = partial(ours, config, backend)
            table[word] = Provider(word, partial(run, loss), slack=two)
        for word, other in (("linear_token_logprobs", two_functions), ("eager", eager)):
            table[word] = Provider(word, partial(run, partial(other, config)), slack=two)
        table["matmul"] = Provider("matmul", bare)
        size = (shape[0] + shape[2]) * shape[1] * dtype.itemsize
        return Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=dtype,
            draw=partial(draw, shape, dtype, options.device),
            reference=partial(reference, config),
            probe=lambda inputs: inputs.weight,
            probe_bytes=shape[2] * shape[1] * dtype.itemsize,
            traffic=Traffic(2 * size, size),
            providers=[
                provider for word, provider in table.items() if word.split()[0] in options.providers
            ],
            threads=options.threads,
        )

    others = [torch.bfloat16] if options.dtype == torch.float32 else []
    for dtype in (options.dtype, *others):
        yield case("token level", standard, dtype)
        yield case("sequence level", standard, dtype)
        small = (standard[0], WIDTH, options.vocab // 4)
        yield case("token level, quarter of V", small, dtype)
        yield case("token level, four chunks", (4 * small[0], *small[1:]), dtype)
