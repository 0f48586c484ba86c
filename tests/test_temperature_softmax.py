"""temperature_softmax on every backend present against float64: values, gradients, hard rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyllmtune import temperature_softmax
from tests import helpers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VOCABS = (1, 2, 31, 33, 1000, 50257)
INF = math.inf
MIXED = (0.7, 0.0, 1e-4, 1.0, 1e4)
# relative error of one rounding to the dtype of the result, and the error among subnormal numbers
ROUNDING = {
    torch.float64: (0.0, 0.0),
    torch.float32: (0.0, 0.0),
    torch.bfloat16: (2**-8, 0.0),
    torch.float16: (2**-11, 2**-25),
}


def assert_values(
    got: Tensor, want: Tensor, what: str, tolerance: float | None = None, size: Tensor | None = None
) -> None:
    """Same NaN, same infinities; elsewhere one rounding, and ``tolerance`` of ``size``, which is
    the row's largest value, at least 1.
    """
    got, want = got.detach(), want.detach()
    relative, absolute = ROUNDING[got.dtype]
    rounded = want.to(got.dtype).double()
    wide = got.double()
    same = (wide == rounded) | (wide.isnan() & rounded.isnan())
    if tolerance is None:
        tolerance = helpers.FORWARD[got.dtype]
    finite = torch.where(want.isfinite(), want, 0).abs()
    if size is None:
        size = finite.amax(-1, keepdim=True).clamp(min=1.0)
    near = (wide - want).abs() <= tolerance * size + relative * finite + absolute
    edge = (want.abs() - 65520).abs() < 80  # float16: a logit's last bit decides if it is infinite
    wrong = ~(same | (near & rounded.isfinite()) | (edge & (got.dtype == torch.float16)))
    assert not wrong.any(), f"{what}: {wide[wrong][:3].tolist()} not {want[wrong][:3].tolist()}"


def closed_form(
    output: Tensor, grad: Tensor, temperature: Tensor, log: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in logits and temperature from the output alone, in float64; and the sum of the
    temperature's absolute terms, by which its error is judged. All ``[rows, V]`` or ``[rows]``.
    """
    y, g = output.detach().double(), grad.double()
    scale = temperature.double()[:, None]
    allowed = (y != -INF) if log else (y != 0)
    p = y.exp() if log else y
    log_p = torch.where(allowed, y if log else y.log(), 0.0)
    g = torch.where(allowed, g, 0.0)
    dy = g - p * g.sum(-1, keepdim=True) if log else p * (g - (g * p).sum(-1, keepdim=True))
    dy = torch.where(allowed & ((scale != 0) | y.isnan()), dy, 0.0)
    inverse = 1 / torch.where(scale == 0, 1.0, scale)
    terms = dy * log_p * inverse
    return dy * inverse, -terms.sum(-1), terms.abs().sum(-1)


def compare(
    backend: str,
    logits: Tensor,
    temperature: float | Tensor,
    log: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Values against float64 on the same input; gradients against the closed form of the output
    that was saved, rounded as it is.
    """
    leaf = logits.detach().requires_grad_()
    wide = logits.detach().double()
    learnt = isinstance(temperature, Tensor)
    if learnt:
        temperature = temperature.detach().clone().requires_grad_()
    got = temperature_softmax(leaf, temperature, log=log, dtype=dtype, backend=helpers.use(backend))
    assert got.dtype == (dtype or logits.dtype) and got.shape == logits.shape
    rows = logits.shape[:-1]
    t = torch.as_tensor(temperature, dtype=torch.float64).detach().expand(rows)
    assert_values(got, temperature_softmax(wide, t, log=log, backend="reference"), "values")

    upstream = torch.randn(logits.shape).to(got.dtype)
    wanted = [leaf, temperature] if learnt else [leaf]
    grads = torch.autograd.grad(got, wanted, upstream)
    flat = (got.reshape(-1, logits.shape[-1]), upstream.reshape(-1, logits.shape[-1]))
    dz, dt, size = closed_form(*flat, t.reshape(-1), log)
    assert grads[0].dtype == logits.dtype
    if backend == "reference" or logits.numel() == 0:  # the reference starts from the logits
        return
    inverse = 1 / torch.where(t == 0, 1.0, t).reshape(-1, 1)
    accuracy = 1e-12 if got.dtype == torch.float64 else 1e-5
    finite = torch.where(dz.isfinite(), dz, 0.0).abs().amax(-1, keepdim=True)
    largest = torch.maximum(inverse * flat[1].double().abs().amax(), finite)
    assert_values(grads[0].reshape(dz.shape), dz, "gradient", accuracy, largest)
    if learnt:
        by_row = grads[1].double().reshape(-1)
        if temperature.dim() == 0:
            dt, size = dt.sum()[None], size.sum()[None]
        assert torch.equal(by_row.isnan(), dt.isnan())
        bound = accuracy * (size + inverse.amax())
        assert ((by_row - dt).abs() <= bound)[~dt.isnan()].all(), "gradient in the temperature"


def random_logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * 3).to(dtype)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=helpers.dtype_id)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
def test_values_and_gradients(backend, dtype, vocab, log):
    if not helpers.runs(backend, dtype):
        with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
            temperature_softmax(random_logits(2, vocab, dtype=dtype), backend=helpers.use(backend))
        return
    if vocab == VOCABS[-1] and dtype != torch.float32 and backend != "cpp":
        return  # slow there, and of no other path than 1000 columns
    logits = random_logits(5, vocab, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    compare(backend, logits, torch.tensor(MIXED, dtype=wide), log)
    if vocab < VOCABS[-1]:  # the slowest; one call has every kind of temperature
        for temperature in (0.0, 1e-4, 0.7, 1.0, 1e4):
            compare(backend, logits[:2], temperature, log)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=helpers.dtype_id)
@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
def test_result_in_another_dtype(backend, dtype, log):
    logits = random_logits(3, 301, dtype=dtype)
    compare(backend, logits, torch.tensor([0.7, 1.0, 0.0]), log, torch.float32)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for source in (logits, logits.float()):
        for result in (other, dtype):
            wide = temperature_softmax(source, 0.7, log=log, dtype=torch.float32, backend=backend)
            got = temperature_softmax(source, 0.7, log=log, dtype=result, backend=backend)
            assert torch.equal(got, wide.to(result))  # one rounding


@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_float64_of_float32_logits_is_computed_in_float64(backend):
    logits = random_logits(3, 50).requires_grad_()
    got = temperature_softmax(logits, 0.7, dtype=torch.float64, backend=helpers.use(backend))
    want = torch.softmax(logits.double() / 0.7, -1)
    assert_values(got, want, "values", 1e-12)
    assert torch.autograd.grad(got[:, 0].sum(), logits)[0].dtype == torch.float32


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("rows", ((), (0,), (4,), (2, 3), (2, 3, 2), (0, 3)), ids=str)
def test_leading_shapes(backend, rows):
    logits = random_logits(*rows, 33)
    compare(backend, logits, torch.rand(rows) + 0.3, True)
    compare(backend, logits, torch.tensor(0.7), False)  # 0-d: autograd adds up its rows


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
def test_strided_rows(backend, dtype, log):
    whole = random_logits(3, 5, 40, dtype=dtype)
    for view in (
        whole[:, :-1],  # the shifted slice of a trainer
        whole[:, 1:, :33],  # rows that are not 16-byte aligned
        whole[..., 3:],
        whole.transpose(0, 1)[1:],
        whole[::2, ::2],
    ):
        compare(backend, view, torch.rand(view.shape[:-1]) + 0.3, log)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_hard_rows(backend, log, dtype):
    logits = random_logits(9, 2600, dtype=dtype)
    logits[0] = 2.0
    logits[1, ::3] = -INF
    logits[2, :2400] = -INF  # whole tiles without an allowed logit
    logits[3] = -INF
    logits[4] = -INF
    logits[4, 2121] = -3.0
    logits[5] = logits[5] * 1e29
    logits[6] = logits[6] + 1e4
    logits[7, 17], logits[8, 2599] = math.nan, INF
    for temperature in (1.0, 0.0, 1e4):
        compare(backend, logits, torch.full((9,), temperature), log)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("temperature", (0.0, 0.6))
@pytest.mark.parametrize("poison", (math.nan, INF), ids=str)
@pytest.mark.parametrize("rest", ("finite", "-inf"))
def test_invalid_row_is_nan_and_alone(backend, temperature, poison, rest):
    logits = random_logits(3, 700)
    if rest == "-inf":
        logits[1] = -INF
    logits[1, 600] = poison
    leaf, learnt = logits.requires_grad_(), torch.full((3,), temperature, requires_grad=True)
    for log in (False, True):
        out = temperature_softmax(leaf, learnt, log=log, backend=helpers.use(backend))
        assert out[1].isnan().all() and not out[[0, 2]].isnan().any()
        grads = torch.autograd.grad(out, (leaf, learnt), torch.randn(3, 700))
        assert grads[0][1].isnan().all() and grads[0][[0, 2]].isfinite().all()
        assert grads[1][[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
def test_forbidden_tokens_are_exactly_nothing(backend, log):
    """Masks select: a NaN upstream of a forbidden token reaches nobody."""
    logits = random_logits(4, 300)
    logits[:3, 5:200:7] = -INF
    logits[3] = -INF
    banned = logits == -INF
    leaf, learnt = logits.requires_grad_(), torch.full((4,), 0.8, requires_grad=True)
    out = temperature_softmax(leaf, learnt, log=log, backend=helpers.use(backend))
    assert (out[banned] == (-INF if log else 0)).all() and out[~banned].isfinite().all()
    upstream = torch.randn(4, 300).masked_fill(banned, math.nan)
    dz, dt = torch.autograd.grad(out, (leaf, learnt), upstream)
    assert (dz[banned] == 0).all() and dz.isfinite().all() and (dz[:3] != 0).any(-1).all()
    assert dt.isfinite().all() and dt[3] == 0


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_temperature_zero_is_greedy_and_takes_the_lowest_id(backend, dtype):
    logits = random_logits(5, 1500, dtype=dtype)
    best = torch.tensor([0, 1499, 17, 1024, 5])
    logits[torch.arange(5), best] = 50.0
    logits[2, 18:] = 50.0
    logits[4] = 7.0
    best[4] = 0
    want = torch.nn.functional.one_hot(best, 1500)
    leaf, learnt = logits.requires_grad_(), torch.zeros(5, requires_grad=True)
    for temperature in (0.0, 0, learnt):
        for log in (False, True):
            got = temperature_softmax(leaf, temperature, log=log, backend=helpers.use(backend))
            assert torch.equal(got, want.log().to(dtype) if log else want.to(dtype))
            grads = torch.autograd.grad(got, leaf, torch.randn_like(got), retain_graph=True)
            assert (grads[0] == 0).all()
    assert torch.equal(torch.autograd.grad(got, learnt, torch.ones_like(got))[0], torch.zeros(5))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_the_least_temperatures_are_greedy_too(backend):
    """1 / T overflows float32 below 2.9e-39: nothing may become 0 * inf."""
    logits = random_logits(2, 100)
    for temperature in (1e-45, 1e-40, 1e-38, 1e-30):
        got = temperature_softmax(logits, temperature, backend=helpers.use(backend))
        assert torch.equal(got, temperature_softmax(logits, 0.0, backend=backend))
        log = temperature_softmax(logits, temperature, log=True, backend=backend)
        assert torch.equal(log.exp(), got)


@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
def test_closed_form_is_the_gradient_of_the_reference(log):
    logits = random_logits(6, 40, dtype=torch.float64)
    logits[1, ::3], logits[2], logits[3, 7] = -INF, -INF, math.nan
    leaf, temperature = logits.requires_grad_(), torch.tensor([0.7, 1.0, 2.0, 1.0, 0.0, 1e-2])
    temperature = temperature.double().requires_grad_()
    out = temperature_softmax(leaf, temperature, log=log, backend="reference")
    upstream = torch.randn_like(out)
    dz, dt = torch.autograd.grad(out, (leaf, temperature), upstream)
    want = closed_form(out, upstream, temperature.detach(), log)
    torch.testing.assert_close(dz, want[0], equal_nan=True)
    torch.testing.assert_close(dt, want[1], equal_nan=True)


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log"))
@pytest.mark.parametrize("rows", ((), (2, 3)), ids=("0-d", "per row"))
def test_gradcheck(backend, log, rows):
    """Float64 finite differences through the compiled kernel, in logits and temperature."""
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    temperature = (torch.rand(rows, dtype=torch.float64) + 0.5).requires_grad_()

    def softmax(z: Tensor, t: Tensor) -> Tensor:
        return temperature_softmax(z, t, log=log, backend=helpers.use(backend))

    assert torch.autograd.gradcheck(softmax, (logits, temperature))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_lecture(backend):
    """Logits 3 and 1: e^3 / (e^3 + e^1). A low temperature sharpens, a high one flattens."""

    def first(temperature: float) -> float:
        logits = torch.tensor([3.0, 1.0])
        return float(temperature_softmax(logits, temperature, backend=helpers.use(backend))[0])

    assert first(1.0) == pytest.approx(0.880797, abs=1e-6)
    assert first(0.5) == pytest.approx(0.982014, abs=1e-6)
    assert first(2.0) == pytest.approx(0.731059, abs=1e-6)
    assert first(0.0) == 1.0
    assert first(1e6) == pytest.approx(0.5, abs=1e-6)
