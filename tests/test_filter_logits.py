"""filter_logits: the kept set on every backend, its corners, the gate's gradient, bad input."""

from __future__ import annotations

import math
import random

import pytest
import torch

from pyllmtune import filter_logits
from tests import decoding_cases as cases
from tests import helpers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDING = {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-15}


@pytest.mark.parametrize("kind", cases.ROW_KINDS)
@helpers.pairs(helpers.KERNELS, DTYPES)
def test_equals_the_reference(backend, kind, dtype):
    """The same tokens kept, to the token, for random filters; values to a rounding."""
    pick = random.Random(f"{kind}{dtype}")
    sizes = (1, 2, 17, 257, 20_000) if backend == "cpp" else (1, 17, 257, 1500)
    for vocab in sizes:
        for _ in range(4 if backend == "cpp" and vocab < 1000 else 1):
            logits = cases.make_rows(kind, 3, vocab, dtype)
            filters = cases.random_filters(pick, 3, vocab)
            got = filter_logits(logits, **filters, backend=helpers.use(backend))
            want = filter_logits(logits, **filters, backend="reference")
            assert torch.equal(got > -math.inf, want > -math.inf), (vocab, filters)
            inside = want.isfinite()  # a float16 logit divided by 1e-4 is infinite
            assert torch.equal(got[~inside], want[~inside]), (vocab, filters)
            error = (got - want)[inside].double().abs()
            bound = ROUNDING[dtype] * want[inside].double().abs().clamp(min=1e-30)
            assert bool((error <= bound).all()), (vocab, filters)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_corners(backend):
    z = torch.tensor([[1.0, 3.0, 3.0, 2.0, -math.inf]])

    def kept(**filters) -> list[int]:
        out = filter_logits(z, **filters, backend=helpers.use(backend))
        return (out > -math.inf)[0].nonzero()[:, 0].tolist()

    assert kept() == kept(top_k=0) == kept(top_k=4) == kept(top_k=99) == [0, 1, 2, 3]
    assert kept(top_k=1) == [1] and kept(top_k=2) == [1, 2]  # the first of equals
    assert kept(top_p=0.0) == kept(top_p=-3.0) == kept(top_p=1e-12) == [1]
    assert kept(top_p=1.0) == kept(top_p=7.0) == [0, 1, 2, 3]
    assert kept(min_p=1.0) == [1, 2] and kept(min_p=0.0) == [0, 1, 2, 3]
    assert kept(temperature=0.0) == kept(temperature=1e-30) == [1]
    assert kept(temperature=1e4, min_p=0.999) == [0, 1, 2, 3]
    assert kept(temperature=1e-4, top_p=0.4) == [1] and kept(temperature=1e-4, top_p=0.6) == [1, 2]


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_exactly_the_integer_mass_decides(backend):
    """p half a unit of mass below and above each cumulative sum: the kept set changes there and
    nowhere else, so every cumulative mass is the exact integer of the definition.
    """
    row = torch.cat([torch.randn(30) * 3, torch.tensor([0.5, 0.5, 0.5])])
    masses = cases.exact_masses(row)
    order = cases.ranked(row)
    total, before, shares, sizes = sum(masses), 0, [], []
    for size, token in enumerate(order[:-1], start=1):
        before += masses[token]
        shares += [(before - 0.5) / total, (before + 0.5) / total]
        sizes += [size, size + 1]
    p = torch.tensor(shares, dtype=torch.float64)
    logits = row.expand(len(shares), -1).contiguous()
    out = filter_logits(logits, top_p=p, backend=helpers.use(backend))
    kept = out > -math.inf
    exact = torch.tensor([masses[token] > 2**10 for token in order[:-1]]).repeat_interleave(2)
    assert kept.sum(-1).tolist() == sizes
    assert exact.any()
    for line, size in zip(kept, sizes, strict=True):
        assert line.nonzero()[:, 0].tolist() == sorted(order[:size])


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_orders_differ_as_documented(backend):
    """Probabilities .4 .3 .2 .1: what each order keeps, worked out by hand."""
    z = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None]

    def size(**filters) -> int:
        return int((filter_logits(z, **filters, backend=helpers.use(backend)) > -math.inf).sum())

    # after top-k 2: .57 .43; p = .65 needs both. On the whole row, p = .65 is also two tokens
    assert size(top_k=2, top_p=0.5, order="hf") == 1  # .57 reaches .5
    assert size(top_k=2, top_p=0.5, order="joint") == 2  # .4 does not
    assert size(min_p=0.6, top_p=0.5, order="hf") == 2  # .4 does not reach .5 of the whole
    assert size(min_p=0.6, top_p=0.5, order="vllm") == 1  # of .4 and .3 it does
    assert size(temperature=0.1, top_p=0.65, order="hf") == 1  # sharpened first
    assert size(temperature=0.1, top_p=0.65, order="llama.cpp") == 2  # filtered first


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_invalid_rows_are_alone(backend):
    z = torch.randn(4, 50)
    z[0, 7], z[1, 3], z[2] = math.nan, math.inf, -math.inf
    out = filter_logits(z, top_k=3, backend=helpers.use(backend))
    assert out[:2].isnan().all() and (out[2] == -math.inf).all()
    assert torch.equal(out[3:], filter_logits(z[3:], top_k=3, backend="reference"))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_out_and_in_place(backend, dtype):
    """Strided results leave the gaps alone; out may be the logits."""
    z = cases.make_rows("peaked", 6, 300, dtype).reshape(2, 3, 300)
    filters = {"top_p": 0.8, "temperature": torch.tensor([[0.0, 0.5, 1.0]] * 2)}
    want = filter_logits(z, **filters, backend=helpers.use(backend))
    room = torch.full((2, 4, 300), 7.0, dtype=dtype)
    given = filter_logits(z, **filters, out=room[:, :-1], backend=helpers.use(backend))
    assert given.data_ptr() == room.data_ptr() and torch.equal(room[:, :-1], want)
    assert bool((room[:, -1] == 7).all())
    same = z.clone()
    filter_logits(same, **filters, out=same, backend=helpers.use(backend))
    assert torch.equal(same, want)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_gradient_is_a_gate(backend):
    z = cases.make_rows("flat", 4, 70, torch.float32).requires_grad_()
    temperature = torch.tensor([0.5, 0.0, 2.0, 1.0])
    out = filter_logits(z, temperature=temperature, top_p=0.7, backend=helpers.use(backend))
    upstream = torch.randn(4, 70)
    (grad,) = torch.autograd.grad(out, z, upstream)
    inverse = torch.tensor([2.0, 0.0, 0.5, 1.0])[:, None]
    want = torch.where(out > -math.inf, upstream * inverse, 0.0)
    assert torch.equal(grad, want)
    assert bool((want[0] != 0).any())


def test_gradcheck_through_the_compiled_kernel():
    helpers.need("cpp")
    z = (torch.randperm(24).double() / 4).reshape(2, 12).requires_grad_()

    def kept_part(x):
        out = filter_logits(x, temperature=0.7, top_k=5, backend="cpp")
        return out[out > -math.inf]

    assert torch.autograd.gradcheck(kept_part, (z,))


def test_agrees_with_the_lecture():
    """Nucleus: five tokens sum to .91, p = .9 keeps exactly these. Top-k: ten ids, no other."""
    z = torch.tensor([0.04, 0.36, 0.25, 0.15, 0.09, 0.06, 0.05]).log()
    assert (filter_logits(z, top_p=0.9) > -math.inf).nonzero()[:, 0].tolist() == [1, 2, 3, 4, 5]
    long = torch.randn(1000)
    kept = (filter_logits(long, top_k=10) > -math.inf).nonzero()[:, 0]
    assert set(kept.tolist()) == set(long.topk(10).indices.tolist())


@pytest.mark.parametrize(
    ("filters", "message"),
    (
        ({"temperature": -1.0}, "temperature must be finite and 0 or more"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature must be finite"),
        ({"temperature": torch.ones(3)}, r"temperature must have shape \[2\]"),
        ({"top_k": -1}, "top_k must be an integer, 0 or more"),
        ({"top_p": math.nan}, "top_p must be a finite number"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"order": "huggingface"}, "order must be one of hf, vllm, llama.cpp, joint"),
        ({"out": torch.empty(2, 4)}, r"out must have shape \[2, 5\]"),
        ({"out": torch.empty(2, 5, dtype=torch.float64)}, "out must have the dtype of logits"),
    ),
)
def test_bad_input_is_named(filters, message):
    with pytest.raises(ValueError, match=message):
        filter_logits(torch.zeros(2, 5), **filters)


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="top_k must be a number"):
        filter_logits(torch.zeros(2, 5), top_k=2.5)
    with pytest.raises(TypeError, match="top_k must be one of int64, int32"):
        filter_logits(torch.zeros(2, 5), top_k=torch.ones(2))
    with pytest.raises(ValueError, match="temperature requires grad"):
        filter_logits(torch.zeros(2, 5), temperature=torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match="out= records no gradient"):
        filter_logits(torch.zeros(2, 5, requires_grad=True), out=torch.empty(2, 5))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_no_rows(backend):
    assert filter_logits(torch.empty(0, 5), top_k=2, backend=helpers.use(backend)).shape == (0, 5)
