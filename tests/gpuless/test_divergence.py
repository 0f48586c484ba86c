"""kl_divergence on the GPU floors: bits in any order of threads, sanitizers, exact bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyllmtune import kl_divergence
from tests.test_kl_divergence import compare, run

from . import gpu_cases as cases
from .emulator import run_sanitized
from .toolchain import require

WEIGHTS = (None, 0.3)


@pytest.fixture
def floor():
    require("g++", "nvcc")
    from . import emulated_floor

    emulated_floor.install()
    return emulated_floor


@pytest.fixture
def traffic():
    require("triton")
    import pyllmtune._triton  # noqa: F401  registers the floor

    from .triton_guard import guard

    with guard() as seen:
        yield seen


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", (8, 1001, 4100))
def test_bits_do_not_depend_on_the_alignment_of_a_row(floor, vocab, dtype):
    """Aligned rows are read in chunks, others cut out of two: the same sums in the same order."""
    rows = [(torch.randn(1, vocab) * 3).to(dtype) for _ in range(2)]
    for weight in WEIGHTS:
        want = run(*rows, torch.ones(1), "emulated", js_weight=weight)
        for shift in (1, 3):
            moved = torch.zeros(1, vocab + 16, dtype=dtype)[:, shift : shift + vocab]
            moved.copy_(rows[1])
            got = run(rows[0], moved, torch.ones(1), "emulated", js_weight=weight)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def every_result() -> list[Tensor]:
    """Of both kinds; some rows idle, masked, unaligned, infinite or without a maximum."""
    torch.manual_seed(1)
    first, second = (cases.logits_of("unaligned", 2001, torch.bfloat16) for _ in range(2))
    first[0, 1], second[1, 0, ::2] = -math.inf, -math.inf
    upstream = torch.tensor([[1.0, 1.0, 0.0], [2.0, -1.0, 1.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return [
        value
        for weight in WEIGHTS
        for value in run(first, second, upstream, "emulated", mask=mask, js_weight=weight)
    ]


def test_bits_do_not_depend_on_the_order_of_threads(floor):
    want = every_result()  # threads by index
    for seed in (1, 2, 0):
        floor.library("kl_divergence").seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(every_result(), want, strict=True))


def test_small_grids(floor):
    """What the sanitizers run: every kernel and dtype, edges of rows included, few threads."""
    for dtype in cases.DTYPES:
        for vocab, layout in ((7, "contiguous"), (300, "unaligned"), (264, "shifted")):
            first = cases.logits_of(layout, vocab, dtype)
            second = cases.logits_of("transposed", vocab, dtype)
            for weight in WEIGHTS:
                compare("emulated", first, second, js_weight=weight)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ("asan", "tsan"))
def test_sanitizers_find_nothing(flavour):
    outcome = run_sanitized(flavour, "pytest", __file__, "-q", "-k", "test_small_grids")
    assert outcome.returncode == 0 and "1 passed" in outcome.output, outcome.output[-4000:]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("vocab", (1, 257, 3001))
@pytest.mark.parametrize("weight", WEIGHTS)
def test_bytes(traffic, dtype, vocab, weight):
    """Forward reads each selected row once, a mixture twice, and a byte of mask; it writes 7
    numbers. Backward reads the rows that have a gradient and writes what is wanted.
    """
    rows = [cases.logits_of("shifted", vocab, dtype) for _ in range(2)]
    leaf = rows[0].detach().requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, True]])
    out = kl_divergence(leaf, rows[1], mask=mask, js_weight=weight, backend="triton")
    upstream = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    torch.autograd.grad(out, leaf, upstream)
    forward, backward = traffic.launches
    size = vocab * dtype.itemsize
    assert forward.loaded == 4 * (1 if weight is None else 2) * 2 * size + 6
    assert forward.stored == 6 * 7 * 4
    programs = -(-vocab // (2048 if dtype == torch.float32 else 4096))
    idle, more = 2 * 4 + 1, 4 * 4 if weight is None else 5 * 4
    active = 2  # selected, and with an upstream gradient
    assert backward.loaded == active * 2 * size + programs * (6 * idle + active * more)
    assert backward.stored == 6 * size
