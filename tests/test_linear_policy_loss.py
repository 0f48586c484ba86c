"""linear_policy_loss on every backend present against the reference in float64: loss, metrics and
gradients.
"""

from __future__ import annotations

import math

import pytest
import torch

from pyllmtune import PolicyLossConfig, linear_policy_loss, linear_token_logprobs, policy_loss
from pyllmtune.losses.metrics import SUMS
from pyllmtune.ops import linear_policy_blocks as blocks
from tests import helpers
from tests.linear_policy_cases import VALUES, batch, compare, run, small_chunks, workspace

CPU = torch.device("cpu")


@pytest.fixture
def chunks(monkeypatch):
    return small_chunks(monkeypatch)


PRESETS = (
    *("lecture", "trl.grpo", "trl.gspo", "trl.cispo", "trl.dapo", "trl.dr_grpo", "verl.vanilla"),
    *("verl.gmpo", "nemo.grpo", "nemo.cispo"),
)


def preset(name: str) -> tuple[PolicyLossConfig, dict[str, float]]:
    config = PolicyLossConfig.preset(name)
    needs = config.aggregation in ("constant", "length-weighted")
    return config, {"normalizer": 7.0} if needs else {}


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets(backend, name, chunks):
    """All rows at once, and where the loss allows it in chunks."""
    config, options = preset(name)
    data = batch()
    compare(data, backend, config=config, **options)
    whole = len(chunks)
    assert whole == (backend != "reference")
    compare(data, backend, config=config, workspace_bytes=workspace(data, 5), **options)
    selected = int(data["mask"].sum())
    by_token = config.level == "token" and config.aggregation != "seq-mean-token-mean"
    if backend != "reference":
        assert len(chunks) - whole == (-(-selected // 4) if by_token else 0)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", VALUES, ids=helpers.dtype_id)
@pytest.mark.parametrize("rows", (None, 4), ids=("whole", "chunks"))
def test_dtypes(backend, dtype, rows, chunks):
    if not helpers.runs(backend, dtype):
        with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
            run(batch(dtype=dtype), backend)
        return
    bias = torch.randn(2051, dtype=helpers.accumulator(dtype))
    data = batch(V=2051, dtype=dtype) | {"bias": bias}
    config = PolicyLossConfig(entropy_coef=0.05, kl="k3", kl_coef=0.1)
    space = None if rows is None else workspace(data, rows)
    compare(data, backend, config=config, workspace_bytes=space)


OPTIONS = {
    "bias": {"bias": torch.linspace(-1, 1, 300)},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": 0.25},
    "temperature": {"temperature": 0.6},
    "temperature per row": {"temperature": torch.linspace(0.5, 2, 12).view(3, 4)},
    "all": {
        "bias": torch.linspace(-1, 1, 300),
        "softcap": 5.0,
        "logit_scale": 0.7,
        "temperature": torch.linspace(0.5, 2, 12).view(3, 4),
    },
}


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", (None, 4), ids=("whole", "chunks"))
def test_options_of_the_head(backend, name, rows, chunks):
    """A kept tile is turned into z twice, forward and backward; in float32 and bfloat16."""
    config = PolicyLossConfig(entropy_coef=0.1)
    for dtype in (torch.float32, torch.bfloat16):
        data = batch(dtype=dtype) | OPTIONS[name]
        space = None if rows is None else workspace(data, rows)
        compare(data, backend, config=config, workspace_bytes=space)


LOSSES = {
    "entropy": {"config": PolicyLossConfig(entropy_coef=0.2)},
    "kl": {"config": PolicyLossConfig(kl="k3", kl_coef=0.3)},
    "sequence": {"config": PolicyLossConfig(level="sequence")},
    "means of means": {"config": PolicyLossConfig(aggregation="seq-mean-token-mean")},
    "sums": {"config": PolicyLossConfig(aggregation="seq-mean-token-sum")},
    "number": {"normalizer": 5.0},
    "tensor": {"normalizer": torch.tensor(5.0)},
}


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", (None, 4), ids=("whole", "chunks"))
def test_losses(backend, name, rows, chunks):
    """With a mask, without one, with an advantage per token."""
    data = batch()
    space = None if rows is None else workspace(data, rows)
    options = {"workspace_bytes": space, **LOSSES[name]}
    compare(data, backend, **options)
    compare({**data, "mask": None, "advantages": torch.randn(3, 4)}, backend, **options)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("rows", (None, 4), ids=("whole", "chunks"))
def test_packed_is_padded(backend, rows, chunks):
    """Tokens of three sequences of which one is empty; the padded batch masks what is not there."""
    padded, lengths = batch(), (3, 0, 4)
    there = torch.arange(4) < torch.tensor(lengths)[:, None]
    padded["mask"] = there
    names = ("hidden", "tokens", "old_logprobs", "ref_logprobs", "weights")
    packed = {**padded, **{name: padded[name][there] for name in names}, "mask": None}
    packed["cu_seqlens"] = torch.tensor([0, 3, 3, 7])
    options = {} if rows is None else {"workspace_bytes": workspace(padded, rows)}
    compare(packed, backend, **options)
    got, want = (run(data, backend, **options) for data in (packed, padded))
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[2][0], want[2][0][there], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[2][1], want[2][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("rows", (None, 4), ids=("whole", "chunks"))
def test_nothing_to_learn_from(backend, rows, chunks):
    """All masked, whatever the rows hold; advantages of 0; no rows at all."""
    data = batch()
    options = {} if rows is None else {"workspace_bytes": workspace(data, rows)}
    masked = {**data, "mask": torch.zeros(3, 4), "hidden": torch.full((3, 4, 9), math.nan)}
    idle = {**data, "advantages": torch.zeros(3)}
    empty = {name: value[:, :0] if value.dim() > 1 else value for name, value in data.items()}
    empty["weight"] = data["weight"]
    for case in (masked, idle, empty):
        loss, metrics, grads = run(case, backend, **options)
        assert loss == 0 and metrics.isfinite()[: len(SUMS)].all()
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("backend", helpers.KERNELS)
@pytest.mark.parametrize("rows", (None, 4), ids=("whole", "chunks"))
def test_rows_without_a_gradient_are_left_out(backend, rows, chunks):
    """A NaN in a row that is dropped would spoil dW if it took part."""
    data = batch() | {"mask": None}
    data["hidden"][0, 1] = math.nan
    data["old_logprobs"][1, 2] = -math.inf
    data["advantages"][2] = 0.0
    options = {} if rows is None else {"workspace_bytes": workspace(data, rows)}
    loss, metrics, (by_hidden, by_weight) = run(data, backend, **options)
    assert loss.isfinite() and metrics[SUMS.index("dropped")] == 2
    assert by_weight.isfinite().all() and by_weight.any()
    idle = torch.zeros(3, 4, dtype=torch.bool)
    idle[0, 1] = idle[1, 2] = idle[2] = True
    assert torch.equal(by_hidden[idle], torch.zeros_like(by_hidden[idle]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
@pytest.mark.parametrize("rows", (None, 512, 1024))
def test_chunks_on_the_cpu(dtype, rows):
    """True sizes: several tiles and chunks; the same numbers with any of them."""
    data = batch(4, 300, 33, 2100, dtype)
    space = None if rows is None else workspace(data, rows)
    if rows is None:
        assert blocks.default_workspace(2100, CPU, dtype) < workspace(data, 1200)
    compare(data, "cpp", workspace_bytes=space)


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("frozen", ("hidden", "weight", "both"))
def test_frozen_operands_get_no_gradient(backend, frozen):
    data = batch() | {"bias": torch.randn(300)}
    _, _, (by_hidden, by_weight, by_bias) = run(data, backend)
    moving = {name: data[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    for name in ("hidden", "weight") if frozen == "both" else (frozen,):
        moving[name].requires_grad_(False)
    out = linear_policy_loss(**{**data, **moving}, backend=helpers.use(backend))
    (1.5 * out.loss).backward()
    for name, grad in (("hidden", by_hidden), ("weight", by_weight), ("bias", by_bias)):
        if moving[name].requires_grad:
            torch.testing.assert_close(moving[name].grad, grad, rtol=1e-6, atol=1e-8)
        else:
            assert moving[name].grad is None


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_the_two_functions_run_where_no_gradient_is_wanted(backend, chunks):
    data = batch()
    want = run(data, backend)
    assert chunks.pop() == int(data["mask"].sum())
    for grad_mode, leaf in ((True, False), (False, True)):
        hidden = data["hidden"].clone().requires_grad_(leaf)
        with torch.set_grad_enabled(grad_mode):
            out = linear_policy_loss(**{**data, "hidden": hidden}, backend=backend)
        assert not out.loss.requires_grad and not chunks
        assert torch.equal(out.loss, want[0]) and torch.equal(out.metrics.vector, want[1])


@pytest.mark.parametrize("backend", helpers.KERNELS)
@pytest.mark.parametrize("name", ("trl.grpo", "verl.vanilla", "trl.gspo"))
def test_same_as_the_two_functions(backend, name):
    """On the same floor: the same loss and metrics, bit by bit."""
    config, options = preset(name)
    data = batch()
    loss, metrics, grads = run(data, backend, config=config, **options)

    def two(hidden, weight, tokens, old_logprobs, advantages, mask, ref_logprobs, weights, **rest):
        head = {name: rest.pop(name) for name in ("backend",)}
        scores = linear_token_logprobs(hidden, weight, tokens, mask=mask, **head)
        constants = {"ref_logprobs": ref_logprobs, "weights": weights, "entropy": scores.entropy}
        return policy_loss(
            *(scores.logprobs, old_logprobs, advantages, mask), **constants, **rest, **head
        )

    want, expected, truth = run(data, backend, two, config=config, **options)
    assert torch.equal(loss, want) and torch.equal(metrics, expected)
    for grad, right in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-7)


BAD = {
    r"tokens must be \[B, T\], got \[12\]": {
        "hidden": torch.zeros(12, 9),
        "tokens": torch.zeros(12, dtype=torch.int64),
        "mask": None,
    },
    "tokens must have shape": {"tokens": torch.zeros(3, 5, dtype=torch.int64)},
    r"old_logprobs must have shape \[3, 4\], the shape of tokens": {
        "old_logprobs": torch.zeros(3, 5)
    },
    "old_logprobs must be a torch.Tensor": {"old_logprobs": None},
    "advantages must have shape": {"advantages": torch.zeros(4)},
    "mask must have shape": {"mask": torch.ones(3)},
    "weights must have shape": {"weights": torch.ones(5)},
    "kl='k3' needs ref_logprobs=": {
        "config": PolicyLossConfig(kl="k3", kl_coef=0.1),
        "ref_logprobs": None,
    },
    "needs normalizer=": {"config": PolicyLossConfig(aggregation="constant")},
    "softcap must be positive": {"softcap": -1.0},
    "workspace_bytes must be at least": {"workspace_bytes": 5},
    "weight is torch.bfloat16 and hidden": {"weight": torch.zeros(300, 9, dtype=torch.bfloat16)},
}


@pytest.mark.parametrize("message", BAD, ids=lambda message: message[:40])
@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_bad_input_is_refused_by_name(message, backend):
    with pytest.raises((TypeError, ValueError), match=message):
        linear_policy_loss(**{**batch(), **BAD[message]}, backend=helpers.use(backend))
