"""filter_logits and sample as CUDA kernels, executed on the CPU: every id as in the reference, for
any filters and order of threads; sanitizers.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyllmtune import _ops, beam_step, filter_logits, sample
from pyllmtune.reference import sample as reference

from . import gpu_cases as cases
from .emulator import run_sanitized
from .toolchain import require

KINDS = ("spread", "flat", "ties", "equal", "zeros", "holes")
FILTERS = (
    {},
    {"temperature": 0.0},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"min_p": 0.1, "temperature": 1.7},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7, "order": "hf"},
    {"top_k": 90, "top_p": 0.5, "min_p": 0.3, "temperature": 2.0, "order": "vllm"},
    {"top_k": 60, "top_p": 0.8, "min_p": 0.1, "temperature": 0.5, "order": "llama.cpp"},
    {"top_k": 3000, "top_p": 0.99, "min_p": 1e-3, "temperature": 3.0, "order": "joint"},
)


@pytest.fixture(autouse=True)
def floor():
    require("g++", "nvcc")
    from . import emulated_floor

    emulated_floor.install()
    return emulated_floor


def rows_of(kind: str, vocab: int, dtype: torch.dtype) -> Tensor:
    """``[2, 3, vocab]``, rows unaligned."""
    z = {
        "spread": lambda: torch.randn(2, 3, vocab) * 3,
        "flat": lambda: torch.randn(2, 3, vocab) * 0.1,
        "ties": lambda: (torch.randn(2, 3, vocab) * 2).round(),
        "equal": lambda: torch.full((2, 3, vocab), -1.5),
        "zeros": lambda: torch.where(torch.rand(2, 3, vocab) < 0.5, 0.0, -0.0),
        "holes": lambda: torch.randn(2, 3, vocab).masked_fill(
            torch.rand(2, 3, vocab) < 0.5, -math.inf
        ),
    }[kind]()
    wide = torch.zeros(2, 3, vocab + 5, dtype=dtype)
    wide[..., 3 : vocab + 3] = z
    return wide[..., 3 : vocab + 3]


def draw(logits: Tensor, backend: str, **options: Any):
    """All results that there are."""
    options = {"num_samples": 3, "logprobs": ("raw", "scaled", "processed")} | options
    torch.manual_seed(5)  # the seeds of rows
    return sample(logits, return_stats=True, return_kept=True, backend=backend, **options)


def assert_drawn(logits: Tensor, **options: Any) -> None:
    """Ids, ranks and counts are those of the reference; the rest is as near as float32 comes."""
    got, want = (draw(logits, backend, **options) for backend in ("emulated", "reference"))
    for name in ("tokens", "valid", "rank", "num_kept"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(got.kept.token_ids, want.kept.token_ids)
    assert torch.equal(got.kept.offsets, want.kept.offsets)
    floats = {"kept_mass": (got.kept_mass, want.kept_mass), "entropy": (got.entropy, want.entropy)}
    floats |= {kind: (got.logprobs[kind], want.logprobs[kind]) for kind in got.logprobs}
    for name, (value, expected) in floats.items():
        cases.assert_within(value, expected.double(), 3e-6 + 1e-6 * expected.abs(), name)


def assert_filtered(logits: Tensor, **options: Any) -> None:
    """Equal to the reference, gradient included."""
    upstream = torch.randn(logits.shape).to(logits.dtype)
    results = []
    for backend in ("emulated", "reference"):
        leaf = logits.detach().requires_grad_()
        out = filter_logits(leaf, backend=backend, **options)
        (gradient,) = torch.autograd.grad(out, leaf, upstream)
        results.append((out.detach(), gradient))
    for got, want in zip(*results, strict=True):
        assert got.dtype == logits.dtype and torch.equal(got, want)


def assert_beams(logits: Tensor, **options: Any) -> None:
    """Candidates of two beams an item; tests/test_beam_step.py has the grid."""
    scores = torch.tensor([[-3.0, -2.0], [-1.0, -math.inf]])
    got, want = (
        beam_step(logits, scores, num_beams=2, backend=backend, **options)
        for backend in ("emulated", "reference")
    )
    cases.assert_within(got.scores, want.scores.double(), 3e-6, "scores")
    for name in ("tokens", "parents", "is_eos", "valid"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", (1, 33, 257))
def test_against_the_reference(vocab, kind, dtype):
    logits = rows_of(kind, vocab, dtype)
    for filters in FILTERS:
        assert_drawn(logits, **filters)
        assert_filtered(logits, **filters)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("spread", "flat", "ties"))
def test_rows_whose_candidates_overflow_the_list(kind, dtype):
    """More than 4,096 tokens are needed: the search goes over the row."""
    logits = rows_of(kind, 9001, dtype)[:1, :2]
    for filters in ({"top_k": 4500}, {"top_p": 0.97}, FILTERS[-1]):
        assert_drawn(logits, **filters)
        assert_filtered(logits, **filters)


def test_parameters_of_rows():
    logits = rows_of("spread", 600, torch.bfloat16)
    rows = {
        "temperature": torch.tensor([[0.0, 1e-19, 0.5], [1.0, 3e38, 2.0]]),
        "top_k": torch.tensor([[0, 5, 700], [1, 50, 550]]),
        "top_p": torch.tensor([[0.5, 2.0, 0.9], [-1.0, 0.3, 1.0]]),
        "min_p": torch.tensor([[0.0, 0.1, 1e-45], [1.0, 0.0, 1e-3]]),
    }
    for order in ("hf", "vllm", "llama.cpp", "joint"):
        assert_drawn(logits, order=order, **rows)
        assert_filtered(logits, order=order, **rows)


def test_min_p_on_its_edge():
    """Tokens whose exponent equals log2(min_p), or misses it by a number that a GPU may flush."""
    steps = torch.arange(-40, 41) * 2.0**-24
    logits = torch.cat([torch.zeros(1), math.log(0.5) + steps])[None]
    assert_drawn(logits, min_p=0.5)
    assert 2 < int(draw(logits, "emulated", min_p=0.5).num_kept) < 80
    tiny = torch.tensor([[3e-45, 1.4e-45, 0.0, -0.0, -1.4e-45]])
    assert_drawn(tiny, min_p=1.0)
    assert_drawn(tiny, min_p=1e-45)


@pytest.mark.parametrize("packed", (False, True))
def test_allowed_tokens_and_chosen_rows(packed):
    """What is not allowed may hold anything."""
    vocab = 301
    logits = rows_of("spread", vocab, torch.bfloat16)
    chosen = torch.tensor([4, 0, 4, 5, 2, 1, 3, 0])
    allowed = torch.rand(8, vocab) < 0.4
    allowed[4] = False
    words = torch.zeros(8, 10 * 32, dtype=torch.int64)
    words[:, :vocab] = allowed
    words = (words.view(8, 10, 32) << torch.arange(32)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    for options in ({"top_k": 20, "top_p": 0.9}, {"temperature": 0.0}):
        mask = words if packed else allowed
        assert_drawn(logits, allowed=mask, row_indices=chosen, **options)
        assert_drawn(logits[0, :1], allowed=mask[0], **options)
    logits[1, 1, ~allowed[0]] = math.nan
    assert_drawn(logits[1, 1], allowed=(words if packed else allowed)[0], top_p=0.9)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bad_rows_are_flagged_alone(dtype):
    logits = rows_of("spread", 77, dtype)
    logits[0, 0, 5], logits[0, 2, 76], logits[1, 1] = math.nan, math.inf, -math.inf
    words = logits.view(torch.int32 if dtype == torch.float32 else torch.int16)
    words[1, 0, 3] = -1  # a NaN below -inf, were it ordered
    for filters in ({}, {"top_k": 3, "top_p": 0.8}, {"temperature": 0.0}):
        assert_drawn(logits, **filters)
        got, want = (filter_logits(logits, backend=b, **filters) for b in ("emulated", "reference"))
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_a_gpu_flags_rows_that_checks_on_the_cpu_refuse():
    """Parameters that are not numbers, rows that do not exist: nothing is read, no other row."""
    logits = torch.randn(2, 4, 65)
    temperature = torch.tensor([1.0, -1.0, math.nan, math.inf, 1.0, 1.0, 0.7, 1.0])
    top_p = torch.tensor([0.9] * 4 + [math.nan, 0.9, 0.9, 0.9], dtype=torch.float64)
    min_p = torch.tensor([0.0] * 5 + [math.nan, 0.0, 0.0])
    filters = (1.0, temperature, 5, None, 1.0, top_p, 0.0, min_p, 0)
    rest = (1, 7, None, 0, None, True, True, True, True)
    run = _ops.handle("sample", "emulated")
    got, want = (
        run(logits, *filters, None, None, *rest),
        reference.sample(logits, *filters, None, None, *rest),
    )
    assert want[1].tolist() == [True, False, False, False, False, False, True, True]
    for index in (0, 1, 3, 4, 7):
        assert torch.equal(got[index], want[index])

    off = (1.0, None, 5, None, 1.0, None, 0.0, None, 0)
    chosen = torch.tensor([0, 8, -1, 2**40, 7])
    got = run(logits, *off, None, chosen, *rest)
    want = reference.sample(logits, *off, None, torch.tensor([0, 7]), *rest)
    assert got[1].tolist() == [True, False, False, False, True]
    assert got[0].flatten().tolist()[1:4] == [-1, -1, -1]
    assert torch.equal(got[0][[0, 4]], want[0]) and torch.equal(got[7], want[7])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_filter_in_place_and_into_a_view(dtype):
    for vocab in (40, 257):
        logits = rows_of("ties", vocab, dtype)
        want = filter_logits(logits, top_k=9, top_p=0.9, backend="reference")
        view = torch.zeros(2, 3, vocab + 4, dtype=dtype)[..., 1 : vocab + 1]
        assert torch.equal(
            filter_logits(logits, top_k=9, top_p=0.9, out=view, backend="emulated"), want
        )
        filter_logits(logits, top_k=9, top_p=0.9, out=logits, backend="emulated")
        assert torch.equal(logits, want)


def every_result() -> list[Tensor]:
    torch.manual_seed(1)
    results = []
    for kind, vocab in (("spread", 700), ("ties", 5003)):
        logits = rows_of(kind, vocab, torch.bfloat16)[:1, :2]
        for filters in FILTERS[1:8:2]:
            out = draw(logits, "emulated", **filters)
            results += [out.tokens, out.rank, out.kept_mass, out.entropy, out.kept.token_ids]
            results += [
                *out.logprobs.values(),
                filter_logits(logits, backend="emulated", **filters),
            ]
        groups = {"num_groups": 2, "diversity_penalty": 0.5, "num_candidates": 8}
        scores = torch.zeros(1, 2)
        results += beam_step(logits, scores, num_beams=2, **groups, backend="emulated")
    return results


def test_bits_do_not_depend_on_the_order_of_threads(floor):
    want = every_result()  # threads by index
    for seed in (1, 2, 0):
        for word in ("filter_logits", "sample", "beam_step"):
            floor.library(word).seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(every_result(), want, strict=True))


def test_small_grids():
    """What the sanitizers run: lists and whole rows, every dtype and filter."""
    for dtype, kind in zip(cases.DTYPES, ("spread", "ties", "holes"), strict=True):
        logits = rows_of(kind, 301, dtype)[:, :1]
        for filters in FILTERS[1::2]:
            assert_drawn(logits, **filters)
            assert_filtered(logits, **filters)
        filter_logits(logits, top_k=5, out=logits, backend="emulated")
        beams = rows_of(kind, 301, dtype)[:, :2]
        assert_beams(beams, renormalize=False, allowed=torch.rand(301) < 0.9, eos_token_id=4)
        assert_beams(beams[..., :3], num_groups=2, diversity_penalty=0.5)
    assert_beams(rows_of("equal", 2300, torch.float32)[:, :2], num_candidates=3)
    assert_drawn(rows_of("flat", 5003, torch.float32)[:1, 0], top_k=4300, top_p=0.97)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ("asan", "tsan"))
def test_sanitizers_find_nothing(flavour):
    outcome = run_sanitized(flavour, "pytest", __file__, "-q", "-k", "test_small_grids")
    assert outcome.returncode == 0 and "1 passed" in outcome.output, outcome.output[-4000:]
