"""kl_divergence on every backend present against float64: values, gradients, close rows, edges."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyllmtune import kl_divergence
from tests import helpers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"reverse": True},
    "js": {"js_weight": 0.5},
    "skewed js": {"js_weight": 0.1},
}
INF = math.inf
kinds = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("kind", ("forward", "skewed js"))  # reverse only swaps, in Python
backends = pytest.mark.parametrize("backend", helpers.BACKENDS)


def pair(
    rows: tuple[int, ...], vocab: int, dtype: torch.dtype = torch.float32, distance: float = 2.0
) -> tuple[Tensor, Tensor]:
    logits = torch.randn(*rows, vocab) * 3
    return logits.to(dtype), (logits + distance * torch.randn(*rows, vocab)).to(dtype)


def run(
    first: Tensor, second: Tensor, upstream: Tensor, backend: str, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and both gradients, of the views themselves."""
    leaves = [x.detach().requires_grad_() for x in (first, second)]
    out = kl_divergence(*leaves, backend=backend, **options)
    total = (torch.where(out.isinf(), 0, out) * upstream.to(out.dtype)).sum()
    return out.detach(), *torch.autograd.grad(total, leaves)


def compare(backend: str, first: Tensor, second: Tensor, **options: Any) -> None:
    """Value and gradients against the reference in float64 on the same input."""
    dtype, shape = first.dtype, first.shape[:-1]
    upstream = torch.randn(shape, dtype=torch.float64) * (torch.rand(shape) > 0.3)
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    got = run(first, second, upstream, helpers.use(backend), **options)
    want = run(first.double(), second.double(), upstream, "reference", **wide)
    assert got[0].dtype == helpers.accumulator(dtype) and (got[0][got[0].isfinite()] >= 0).all()
    helpers.assert_close(got[0], want[0], helpers.FORWARD[dtype], "divergence")
    # log(p/q) - KL: a difference of two numbers of the size of KL
    sizes = want[0][want[0].isfinite()]
    size = max([1.0, *sizes.tolist()]) if dtype == torch.float32 else 1.0
    for value, expected in zip(got[1:], want[1:], strict=True):
        assert value.dtype == dtype
        helpers.assert_close(value, expected, helpers.BACKWARD[dtype] * size, "gradient")


@backends
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize("vocab", (1, 257, 1000))
def test_values_and_gradients(backend, dtype, vocab, kind):
    if not helpers.runs(backend, dtype):
        with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
            kl_divergence(*pair((2,), vocab, dtype), backend=helpers.use(backend))
        return
    compare(backend, *pair((3,), vocab, dtype), **KINDS[kind])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize("vocab", (2, 7, 4096, 4097, 32769, 70_003))
def test_rows_longer_than_a_tile_and_a_stripe(dtype, vocab, kind):
    compare("cpp", *pair((2,), vocab, dtype), temperature=0.7, **KINDS[kind])


def test_reference_against_torch_and_the_paper():
    """F.kl_div, and the generalised divergence of arXiv:2306.13649 as its equation says."""
    p, q = (torch.randn(5, 40, dtype=torch.float64).softmax(-1) for _ in range(2))
    kl = kl_divergence(p.log(), q.log(), backend="reference")
    torch.testing.assert_close(kl, F.kl_div(q.log(), p, reduction="none").sum(-1))
    back = kl_divergence(p.log(), q.log(), reverse=True, backend="reference")
    torch.testing.assert_close(back, F.kl_div(p.log(), q, reduction="none").sum(-1))
    teacher, student, beta = q, p, 0.2
    m = beta * teacher + (1 - beta) * student
    want = beta * (teacher * (teacher / m).log()).sum(-1)
    want += (1 - beta) * (student * (student / m).log()).sum(-1)
    js = kl_divergence(student.log(), teacher.log(), js_weight=beta, backend="reference")
    torch.testing.assert_close(js, want)


@pytest.mark.parametrize("backend", helpers.KERNELS)
@kinds
@pytest.mark.parametrize("distance", (3e-4, 1e-2, 1.0))
def test_close_rows_keep_their_digits(backend, kind, distance):
    """Divergences from 1e-8 to 1, in float32: error relative to the value, gradients to the
    largest of the row.
    """
    first, second = pair((4,), 20_000 if backend == "cpp" else 700, distance=distance)
    second[1] += 5.0  # an offset changes no distribution
    upstream = torch.ones(4)
    got = run(first, second, upstream, helpers.use(backend), **KINDS[kind])
    want = run(first.double(), second.double(), upstream, "reference", **KINDS[kind])
    assert (want[0] > 0).all()
    assert ((got[0] - want[0]).abs() <= 1e-4 * want[0]).all()
    for value, expected in zip(got[1:], want[1:], strict=True):
        largest = expected.abs().amax(-1, keepdim=True)
        # 3e-4: the logits of the shifted row are rounded to 5e-7, 2e-3 of the least distance
        assert ((value - expected).abs() <= 3e-4 * largest).all()


@pytest.mark.parametrize("backend", helpers.KERNELS)
@both
def test_equal_rows_give_exactly_zero(backend, kind):
    logits, _ = pair((3,), 300)
    logits[1, ::2] = -INF
    out, *grads = run(logits, logits, torch.ones(3), helpers.use(backend), **KINDS[kind])
    for value in (out, *grads):
        assert torch.equal(value, torch.zeros_like(value))


@backends
@both
@pytest.mark.parametrize("rows", ((), (0,), (4,), (2, 3), (2, 3, 2)), ids=str)
def test_leading_shapes(backend, rows, kind):
    compare(backend, *pair(rows, 33), **KINDS[kind])


@backends
@both
def test_temperature_scalar_and_per_row(backend, kind):
    for temperature in (0.3, torch.rand(2, 3) + 0.2, torch.tensor(1.7)):
        compare(backend, *pair((2, 3), 65), temperature=temperature, **KINDS[kind])


@backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_strided_rows(backend, dtype):
    """Both arguments have strides of their own; rows that are not 16-byte aligned."""
    first, second = pair((3, 5), 40, dtype)
    for kind in ({}, {"js_weight": 0.3}):
        compare(backend, first[:, :-1], second[:, 1:], **kind)
        compare(backend, first[:, 1:, :33], second[:, 1:, 3:36], **kind)
        compare(backend, first.transpose(0, 1)[1:], second[:, 1:].transpose(0, 1).contiguous())


@backends
@both
@pytest.mark.parametrize("poison", (math.nan, INF, -INF), ids=str)
def test_masked_rows_are_exactly_zero_whatever_they_hold(backend, kind, poison):
    first, second = pair((4,), 70)
    first[1], second[3, 5] = poison, poison
    mask = torch.tensor([True, False, True, False])
    compare(backend, first, second, mask=mask, **KINDS[kind])
    upstream = torch.ones(4)
    for value in run(first, second, upstream, backend, mask=mask.int(), **KINDS[kind]):
        assert torch.equal(value[~mask], torch.zeros_like(value[~mask]))
        assert value[mask].isfinite().all() and (value[mask] != 0).any()


@backends
@both
@pytest.mark.parametrize("poison", (math.nan, INF), ids=str)
def test_invalid_row_is_nan_and_alone(backend, kind, poison):
    """In either argument, at either end, beside finite logits and beside -inf."""
    for side, where, rest in itertools.product((0, 1), (0, 299), (0.0, -INF)):
        rows = pair((3,), 300)
        if rest == -INF:
            rows[side][1] = -INF
        rows[side][1, where] = poison
        for value in run(*rows, torch.ones(3), helpers.use(backend), **KINDS[kind]):
            assert value[1].isnan().all() and value[[0, 2]].isfinite().all()


@backends
@kinds
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=helpers.dtype_id)
def test_forbidden_tokens(backend, kind, dtype):
    """-inf in the first, in the second, in both, in all of either, in a whole tile."""
    first, second = pair((8,), 1500, dtype)
    first[0, ::3] = -INF
    second[1, 7] = -INF
    first[2, :1100], second[2, :1100] = -INF, -INF
    first[3] = -INF
    second[4] = -INF
    first[5], second[5] = -INF, -INF
    first[6, ::2], second[6, 1::2] = -INF, -INF  # nothing in common
    first[7], first[7, 3] = -INF, 2.0
    compare(backend, first, second, **KINDS[kind])
    out, *grads = run(first, second, torch.ones(8), backend, **KINDS[kind])
    front, back = (second, first) if kind == "reverse" else (first, second)
    if "js" in kind:
        empty = (first == -INF).all(-1) | (second == -INF).all(-1)
        assert out.isfinite().all() and (out[6] > 0.3)
        assert not out[empty].any() and not any(grad[empty].any() for grad in grads)
    else:
        empty = (front == -INF).all(-1)
        infinite = ((front > -INF) & (back == -INF)).any(-1)
        assert torch.equal(out == INF, infinite) and infinite.sum() >= 2
        assert not out[empty].any()
        assert not any(grad[empty | infinite].any() for grad in grads)
    for rows, grad in zip((first, second), grads, strict=True):
        assert not grad[rows == -INF].any()


@pytest.mark.parametrize("backend", helpers.KERNELS)
@kinds
def test_a_token_too_unlikely_for_float32_is_still_forbidden(backend, kind):
    """p = e^-200 is 0 in float32, but the first row allows the token and the second does not."""
    first, second = torch.zeros(1, 40), torch.zeros(1, 40)
    first[0, 5], second[0, 5] = -200.0, -INF
    out, *grads = run(first, second, torch.ones(1), helpers.use(backend), **KINDS[kind])
    if kind == "forward":
        assert out == INF and not any(grad.any() for grad in grads)
    else:
        assert out == 0.0


@backends
@both
def test_extreme_logits(backend, kind):
    """Large offsets, huge spreads, far rows: finite, right, never negative."""
    first, second = pair((5,), 300)
    first[0] += 1e4
    second[0] -= 1e4
    first[1] *= 1e3
    second[2] *= 1e3
    first[3], second[3] = 0.0, 0.0
    first[3, 5], second[3, 8] = 80.0, 80.0  # each is certain of another token
    second[4] += 1e4
    for row in range(5):  # each by its own size
        compare(backend, first[row : row + 1], second[row : row + 1], **KINDS[kind])
    compare(backend, *pair((2,), 300), temperature=100.0, **KINDS[kind])
    compare(backend, *pair((2,), 300), temperature=0.01, **KINDS[kind])
