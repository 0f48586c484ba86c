"""linear_token_logprobs on every backend present against float64, with every option."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyllmtune import linear_token_logprobs, token_logprobs
from tests import helpers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF = math.inf
# the operands are exact in float32; sums of D terms are not, so more than helpers.FORWARD
FORWARD = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-5,
    torch.float16: 2e-5,
}


def head(
    rows: tuple[int, ...], width: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and tokens whose logits have a standard deviation of 3."""
    hidden = torch.randn(*rows, width).to(dtype)
    weight = (torch.randn(vocab, width) * 3 / width**0.5).to(dtype)
    return hidden, weight, torch.randint(0, vocab, rows)


def leaf(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return value.detach().to(dtype or value.dtype).clone().requires_grad_()


def run(backend: str, hidden: Tensor, weight: Tensor, tokens: Tensor, upstream: Tensor, **options):
    """Results, and gradients of hidden, weight and bias. Infinite results get no weight."""
    hidden, weight = leaf(hidden), leaf(weight)
    leaves = [hidden, weight]
    if options.get("bias") is not None:
        options["bias"] = leaf(options["bias"])
        leaves.append(options["bias"])
    out = linear_token_logprobs(hidden, weight, tokens, backend=helpers.use(backend), **options)
    grads = [
        torch.where(value.isinf(), 0, grad).to(value.dtype)
        for value, grad in zip(out, upstream, strict=True)
    ]
    return [value.detach() for value in out], torch.autograd.grad(out, leaves, grads)


def compare(backend: str, hidden: Tensor, weight: Tensor, tokens: Tensor, **options) -> None:
    """Values and gradients against the reference in float64 on the same operands."""
    dtype = hidden.dtype
    upstream = torch.randn(3, *tokens.shape, dtype=torch.float64)
    upstream = upstream * (torch.rand(tokens.shape) > 0.3)  # some rows have none at all
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    got, grads = run(backend, hidden, weight, tokens, upstream, **options)
    want, truth = run("reference", hidden.double(), weight.double(), tokens, upstream, **wide)
    for value, expected in zip(got, want, strict=True):
        assert value.dtype == helpers.accumulator(dtype)
        helpers.assert_close(value, expected, FORWARD[dtype], "result")
    for grad, expected, source in zip(grads, truth, (hidden, weight, None), strict=False):
        assert source is None or grad.dtype == dtype
        # the gradient of the logits is rounded to the operands' dtype, and then the sum
        helpers.assert_close(grad, expected, 2 * helpers.BACKWARD[dtype], "gradient")


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize(
    ("width", "vocab"), ((1, 1), (3, 7), (33, 257), (40, 2051)), ids=("1x1", "3x7", "33", "2051")
)
def test_values_and_gradients(backend, dtype, width, vocab):
    if not helpers.runs(backend, dtype):
        with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
            linear_token_logprobs(*head((2,), width, vocab, dtype), backend=helpers.use(backend))
        return
    compare(backend, *head((5,), width, vocab, dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
@pytest.mark.parametrize(
    ("rows", "width", "vocab"),
    ((1, 300, 5000), (600, 65, 2100), (8192, 7, 40), (2, 8, 262_144), (30, 1100, 33)),
    ids=str,
)
def test_sizes_on_the_cpu(dtype, rows, width, vocab):
    """One row, several chunks and tiles, the widest vocabulary, more than one block along D."""
    compare("cpp", *head((rows,), width, vocab, dtype))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("rows", ((), (0,), (4,), (2, 3), (2, 3, 2), (0, 3)), ids=str)
def test_leading_shapes(backend, rows):
    compare(backend, *head(rows, 5, 33))


OPTIONS = {
    "temperature": lambda: {"temperature": 0.3},
    "temperature per row": lambda: {"temperature": torch.rand(4) + 0.2},
    "temperature tensor": lambda: {"temperature": torch.tensor(1.7)},
    "bias": lambda: {"bias": torch.randn(300)},
    "scale": lambda: {"logit_scale": 0.25},
    "negative scale": lambda: {"logit_scale": -2.0},
    "softcap": lambda: {"softcap": 4.0},
    "mask": lambda: {"mask": torch.tensor([True, False, True, False])},
    "all": lambda: {
        "bias": torch.randn(300),
        "logit_scale": 0.7,
        "softcap": 5.0,
        "temperature": torch.rand(4) + 0.5,
        "mask": torch.tensor([0, 1, 1, 1]),
    },
}


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, name):
    compare(backend, *head((4,), 9, 300), **OPTIONS[name]())
    compare(backend, *head((4,), 9, 300, torch.bfloat16), **OPTIONS[name]())


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_strided_operands(backend):
    hidden, weight, tokens = head((3, 5), 24, 50)
    shifted = hidden[:, :-1]
    compare(backend, shifted, weight, tokens[:, 1:])
    compare(backend, hidden[..., ::2], weight.T.contiguous().T[:, :12], tokens)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_forbidden_tokens_by_bias(backend):
    """-inf in part of the vocabulary, at a target, in a whole tile, and everywhere."""
    hidden, weight, tokens = head((3,), 5, 2100)
    bias = torch.zeros(2100)
    bias[:2060] = -INF  # a whole tile of the CPU
    tokens[:2] = torch.tensor([2070, 3])  # the second is forbidden
    compare(backend, hidden, weight, tokens, bias=bias)
    bias[:] = -INF
    out, grads = run(backend, hidden, weight, tokens, torch.ones(3, 3), bias=bias)
    assert (out[0] == -INF).all() and (out[1] == 0).all() and (out[2] == -INF).all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("poison", (math.nan, INF), ids=str)
def test_masked_rows_are_exactly_zero_whatever_they_hold(backend, poison):
    hidden, weight, tokens = head((4,), 6, 70)
    hidden[1], hidden[3, 2] = poison, poison
    tokens[1] = -100
    mask = torch.tensor([True, False, True, False])
    out, (by_hidden, by_weight) = run(
        backend, hidden, weight, tokens, torch.ones(3, 4), mask=mask.int()
    )
    for value in (*out, by_hidden):
        assert torch.equal(value[~mask], torch.zeros_like(value[~mask]))
        assert value[mask].isfinite().all()
    assert by_weight.isfinite().all()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_everything_masked_keeps_the_graph(backend):
    hidden, weight, tokens = (x.requires_grad_(x.is_floating_point()) for x in head((3,), 4, 30))
    mask = torch.zeros(3, dtype=torch.bool)
    out = linear_token_logprobs(hidden, weight, tokens, mask=mask, backend=helpers.use(backend))
    sum(value.sum() for value in out).backward()
    assert all(torch.equal(value, torch.zeros(3)) for value in out)
    assert torch.equal(hidden.grad, torch.zeros(3, 4))
    assert torch.equal(weight.grad, torch.zeros(30, 4))


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_rows_without_upstream_gradient_are_left_out_of_backward(backend):
    """A NaN there would spoil the weight's gradient if the row took part."""
    hidden, weight, tokens = head((3,), 5, 40)
    hidden[1] = math.nan
    upstream = torch.tensor([1.0, 0.0, 2.0]).expand(3, 3)
    out, (by_hidden, by_weight) = run(backend, hidden, weight, tokens, upstream)
    assert all(value[1].isnan() and value[[0, 2]].isfinite().all() for value in out)
    assert torch.equal(by_hidden[1], torch.zeros(5))
    assert by_weight.isfinite().all() and by_weight.abs().sum() > 0


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_invalid_row_is_nan_and_alone(backend):
    hidden, weight, tokens = head((3,), 5, 2100)
    hidden[1, 2] = math.nan
    out, (by_hidden, _) = run(backend, hidden, weight, tokens, torch.ones(3, 3))
    for value in (*out, by_hidden):
        assert value[1].isnan().all() and value[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", ("cpp", "triton", "emulated"))
def test_token_out_of_range_below_python_poisons_its_row(backend):
    from pyllmtune import _ops

    helpers.use(backend)
    hidden, weight, _ = head((3,), 5, 50)
    for bad in (-1, 50, 2**40):
        args = (hidden, weight, torch.tensor([1, bad, 2]), None, 1.0, None, 1.0, 0.0, None, 1)
        out = _ops.handle("linear_token_logprobs", backend)(*args, False)
        for value in out[:3]:
            assert value[1].isnan() and value[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("frozen", ("hidden", "weight"))
def test_frozen_operands_get_no_gradient(backend, frozen):
    hidden, weight, tokens = head((4,), 6, 50)
    _, (by_hidden, by_weight) = run(backend, hidden, weight, tokens, torch.ones(3, 4))
    moving = {"hidden": weight, "weight": hidden}[frozen].requires_grad_()
    out = linear_token_logprobs(hidden, weight, tokens, backend=helpers.use(backend))
    sum(value.sum() for value in out).backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")
    assert torch.equal(moving.grad, by_weight if frozen == "hidden" else by_hidden)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_tied_embedding(backend):
    """One matrix at both ends of a model: its two gradients add up."""
    table = torch.randn(60, 12, requires_grad=True)
    tokens = torch.randint(0, 60, (2, 6))
    hidden = torch.tanh(table[tokens[:, :-1]])
    options = {"backend": helpers.use(backend)}
    ours = linear_token_logprobs(hidden, table, tokens[:, 1:], **options).logprobs.sum()
    eager = token_logprobs(hidden @ table.T, tokens[:, 1:]).logprobs.sum()
    (got,) = torch.autograd.grad(ours, table, retain_graph=True)
    (want,) = torch.autograd.grad(eager, table)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_retain_graph_and_checkpointing_give_the_same_gradients(backend):
    hidden, weight, tokens = head((5,), 6, 90)
    hidden, weight = leaf(hidden), leaf(weight)
    helpers.use(backend)
    loss = linear_token_logprobs(hidden, weight, tokens, backend=backend).logprobs.sum()
    want = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))

    def score(x: Tensor) -> Tensor:
        return linear_token_logprobs(x, weight, tokens, backend=backend).logprobs.sum()

    kept = torch.autograd.grad(checkpoint(score, hidden, use_reentrant=False), (hidden, weight))
    for got in (again, kept):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_autocast_casts_as_a_linear_layer_would(backend):
    """And rounds nothing else: not the logits, as a matmul inside autocast would."""
    hidden, weight, tokens = head((4,), 16, 80)
    leaves = leaf(hidden), leaf(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_token_logprobs(*leaves, tokens, backend=helpers.use(backend))
    grads = torch.autograd.grad(out.logprobs.sum(), leaves)
    rounded = [value.bfloat16() for value in (hidden, weight)]
    want, expected = run(backend, *rounded, tokens, torch.eye(3)[0, :, None].expand(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    for grad, truth in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, truth.float())


BAD = {
    "hidden must be a torch.Tensor": lambda h, w, t: ([1.0], w, t, {}),
    "hidden must be one of float32": lambda h, w, t: (h.int(), w, t, {}),
    r"hidden must be \[..., D\] with D at least 1": lambda h, w, t: (h[:, :0], w[:, :0], t, {}),
    r"weight must be \[V, 4\] with V at least 1, as": lambda h, w, t: (h, w[:, :3], t, {}),
    r"got \[0, 4\]": lambda h, w, t: (h, w[:0], t, {}),
    "weight is torch.bfloat16 and hidden torch.float32": lambda h, w, t: (h, w.bfloat16(), t, {}),
    "weight is on meta": lambda h, w, t: (h, w.to("meta"), t, {}),
    r"tokens must be in \[0, 9\), got 9": lambda h, w, t: (h, w, torch.tensor([0, 9]), {}),
    r"tokens must have shape \[2\]": lambda h, w, t: (h, w, t[:1], {}),
    r"bias must have shape \[9\]": lambda h, w, t: (h, w, t, {"bias": torch.zeros(8)}),
    "mask must have shape": lambda h, w, t: (h, w, t, {"mask": torch.ones(3)}),
    "temperature must be positive": lambda h, w, t: (h, w, t, {"temperature": 0.0}),
    "logit_scale must be finite and not 0, got 0.0": lambda h, w, t: (h, w, t, {"logit_scale": 0}),
    "softcap must be positive and finite, got -1.0": lambda h, w, t: (h, w, t, {"softcap": -1}),
    "workspace_bytes must be at least": lambda h, w, t: (h, w, t, {"workspace_bytes": 5}),
    "backend must be one of": lambda h, w, t: (h, w, t, {"backend": "cudnn"}),
}


@pytest.mark.parametrize("message", BAD, ids=lambda message: message[:40])
@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_bad_input_is_refused_by_name(message, backend):
    hidden, weight, tokens = head((2,), 4, 9)
    hidden, weight, tokens, options = BAD[message](hidden, weight, tokens)
    with pytest.raises((TypeError, ValueError), match=message):
        linear_token_logprobs(hidden, weight, tokens, **{"backend": backend, **options})
