"""token_logprobs on every backend present against float64, its bits, its edges and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyllmtune import TokenLogprobs, token_logprobs
from tests import helpers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF = math.inf


def grads_of(out: TokenLogprobs, logits: Tensor, weights: Tensor) -> Tensor:
    """Gradient of a weighted sum of the three results; infinite results get weight 0."""
    total = sum(
        (torch.where(value.isinf(), 0, value) * weight.to(value.dtype)).sum()
        for value, weight in zip(out, weights, strict=True)
    )
    return torch.autograd.grad(total, logits)[0]


def compare(backend: str, logits: Tensor, tokens: Tensor, **options) -> None:
    """Values and gradients of all three results against the reference in float64 on the same
    input.
    """
    dtype = logits.dtype
    weights = torch.randn(3, *tokens.shape, dtype=torch.float64)
    weights = weights * (
        torch.rand(tokens.shape) > 0.3
    )  # some rows have no upstream gradient at all
    # strides are kept: the view, not its copy, is what the kernels see
    ours = logits.detach().requires_grad_()
    truth = logits.detach().double().requires_grad_()
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    got = token_logprobs(ours, tokens, backend=helpers.use(backend), **options)
    want = token_logprobs(truth, tokens, backend="reference", **wide)
    for name, value, expected in zip(got._fields, got, want, strict=True):
        assert value.dtype == helpers.accumulator(dtype)
        helpers.assert_close(value, expected, helpers.FORWARD[dtype], name)
    gradient, expected = grads_of(got, ours, weights), grads_of(want, truth, weights)
    assert gradient.dtype == dtype
    helpers.assert_close(gradient, expected, helpers.BACKWARD[dtype], "gradient")


def random_case(rows: tuple[int, ...], vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.randn(*rows, vocab) * 3).to(dtype), torch.randint(0, vocab, rows)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize("vocab", (1, 2, 7, 16, 128, 255, 257, 1000, 4097))
def test_values_and_gradients(backend, dtype, vocab):
    if not helpers.runs(backend, dtype):
        with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
            token_logprobs(*random_case((2,), vocab, dtype), backend=helpers.use(backend))
        return
    compare(backend, *random_case((3,), vocab, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize("vocab", (32768, 32769, 100_003))
def test_rows_longer_than_a_stripe(dtype, vocab):
    """The CPU kernel cuts rows at 32,768: one stripe, one element over, several."""
    compare("cpp", *random_case((2,), vocab, dtype), temperature=0.7)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("rows", ((), (0,), (4,), (2, 3), (2, 3, 2), (0, 3)), ids=str)
def test_leading_shapes(backend, rows):
    compare(backend, *random_case(rows, 33, torch.float32))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_temperature_scalar_and_per_token(backend):
    logits, tokens = random_case((2, 3), 65, torch.float32)
    compare(backend, logits, tokens, temperature=0.3)
    compare(backend, logits, tokens, temperature=torch.rand(2, 3) + 0.2)
    compare(backend, logits, tokens, temperature=torch.tensor(1.7))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_strided_rows(backend, dtype):
    whole, _ = random_case((3, 5), 40, dtype)
    _, tokens = random_case((3, 4), 40, dtype)
    compare(backend, whole[:, :-1], tokens)  # the shifted slice of a trainer
    compare(backend, whole[:, 1:, :33], tokens % 33)  # rows that are not 16-byte aligned
    compare(backend, whole.transpose(0, 1)[1:], tokens.T)
    compare(backend, whole[::2, ::2], tokens[::2, 1:])


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
@pytest.mark.parametrize("poison", (math.nan, INF, -INF), ids=str)
def test_masked_rows_are_exactly_zero_whatever_they_hold(backend, dtype, poison):
    logits, tokens = random_case((4,), 70, dtype)
    logits[1], logits[3, 5] = poison, poison
    tokens[1] = -100
    mask = torch.tensor([True, False, True, False])
    compare(backend, logits, tokens, mask=mask)
    leaf = logits.clone().requires_grad_()
    out = token_logprobs(leaf, tokens, mask=mask.int(), backend=helpers.use(backend))
    sum(value.sum() for value in out).backward()
    for value in (*out, leaf.grad):
        assert torch.equal(value[~mask], torch.zeros_like(value[~mask]))
        assert value[mask].isfinite().all()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("vocab", (1, 40, 5000))
def test_row_with_nothing_allowed(backend, vocab):
    logits, tokens = random_case((3,), vocab, torch.float32)
    logits[1] = -INF
    leaf = logits.clone().requires_grad_()
    out = token_logprobs(leaf, tokens, backend=helpers.use(backend))
    assert out.logprobs[1] == -INF and out.entropy[1] == 0 and out.logsumexp[1] == -INF
    sum(value.sum() for value in out).backward()
    assert torch.equal(leaf.grad[1], torch.zeros(vocab))
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("poison", (math.nan, INF), ids=str)
@pytest.mark.parametrize("where", (0, 17, 4999))
@pytest.mark.parametrize("rest", ("finite", "-inf"))
def test_invalid_row_is_nan_and_alone(backend, poison, where, rest):
    logits, tokens = random_case((3,), 5000, torch.float32)
    if rest == "-inf":
        logits[1] = -INF
    logits[1, where] = poison
    leaf = logits.clone().requires_grad_()
    out = token_logprobs(leaf, tokens, backend=helpers.use(backend))
    assert all(value[1].isnan() for value in out)
    assert all(value[[0, 2]].isfinite().all() for value in out)
    sum(value.sum() for value in out).backward()
    assert leaf.grad[1].isnan().all()
    assert leaf.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_forbidden_tokens(backend, dtype):
    """-inf in part of the row, in whole tiles of it, at the target, everywhere but the target."""
    logits, tokens = random_case((5,), 5000, dtype)
    logits[0, ::3] = -INF
    logits[1, :4500] = -INF
    logits[2, tokens[2]] = -INF
    logits[3] = -INF
    logits[3, tokens[3]] = 2.0
    logits[4, 1:] = -INF
    tokens[4] = 0
    compare(backend, logits, tokens)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_extreme_logits(backend):
    """A large common offset cancels nothing, a huge spread and an extreme temperature stay
    finite.
    """
    logits, tokens = random_case((6,), 300, torch.float32)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2] *= 1e4
    logits[3] = 0.0
    logits[4] = -3e38
    logits[5, tokens[5]] = 3e38
    out = token_logprobs(logits, tokens, backend=helpers.use(backend))
    truth = token_logprobs(logits.double(), tokens, backend="reference")
    helpers.assert_close(out.logprobs[:2], truth.logprobs[:2], 5e-6, "offset logprobs")
    helpers.assert_close(out.entropy, truth.entropy, 2e-5, "entropy")
    helpers.assert_close(out.logprobs[3:], truth.logprobs[3:], 2e-6, "logprobs")
    assert (out.logprobs <= 0).all() and (out.entropy >= 0).all()
    compare(backend, logits[[0, 1, 3]], tokens[[0, 1, 3]], temperature=100.0)
    compare(backend, logits[[0, 3]], tokens[[0, 3]], temperature=0.01)


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_each_gradient_alone(backend):
    """Log-prob, entropy and logsumexp, one at a time and in pairs: a fault in one coefficient
    cannot hide.
    """
    logits, tokens = random_case((3,), 130, torch.float32)
    for chosen in ((0,), (1,), (2,), (0, 1), (1, 2)):
        ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
        got = token_logprobs(ours, tokens, temperature=0.6, backend=helpers.use(backend))
        want = token_logprobs(truth, tokens, temperature=0.6, backend="reference")
        got_grad = torch.autograd.grad(sum(got[i].sum() for i in chosen), ours)[0]
        want_grad = torch.autograd.grad(sum(want[i].sum() for i in chosen), truth)[0]
        helpers.assert_close(got_grad, want_grad, 1e-5, f"gradient of {chosen}")
