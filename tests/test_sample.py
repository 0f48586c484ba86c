"""sample: the same token everywhere, exact probabilities, log-probs, ranks, kept sets, bad rows."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pyllmtune import KeptTokens, SampleOutput, filter_logits, greedy, sample, token_logprobs
from tests import decoding_cases as cases
from tests import helpers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERYTHING = {
    "logprobs": ("raw", "scaled", "processed"),
    "return_stats": True,
    "return_kept": True,
}
LOG_TOLERANCE = 2e-6  # of the largest; the masses are exact to 1.5e-7, float32 results round


def assert_same(got: SampleOutput, want: SampleOutput) -> None:
    for name in ("tokens", "valid", "rank", "num_kept"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(got.kept.token_ids, want.kept.token_ids)
    assert torch.equal(got.kept.offsets, want.kept.offsets)
    for name in ("kept_mass", "entropy"):
        # entropy sums up to V float32 terms of a block before float64
        tolerance = 1e-5 if name == "entropy" else LOG_TOLERANCE
        helpers.assert_close(getattr(got, name), getattr(want, name), tolerance, name)
    for kind in got.logprobs:
        helpers.assert_close(got.logprobs[kind], want.logprobs[kind], LOG_TOLERANCE, kind)


@pytest.mark.parametrize("kind", cases.ROW_KINDS)
@helpers.pairs(helpers.KERNELS, DTYPES)
def test_equals_the_reference(backend, kind, dtype):
    """Tokens, ranks and kept sets to the token, for random filters and allowed masks."""
    pick = random.Random(f"{kind}{dtype}")
    sizes = (1, 2, 17, 257, 20_000) if backend == "cpp" else (1, 33, 1500)
    for vocab in sizes:
        for _ in range(4 if backend == "cpp" and vocab < 1000 else 1):
            logits = cases.make_rows(kind, 3, vocab, dtype)
            arguments = {
                **cases.random_filters(pick, 3, vocab),
                "allowed": cases.random_allowed(pick, 3, vocab),
                "num_samples": pick.choice((1, 3)),
                "seed": torch.randint(-(2**63), 2**63 - 1, (3,)),
                "position": pick.choice((0, 7, 2**40)),
                **EVERYTHING,
            }
            got = sample(logits, **arguments, backend=helpers.use(backend))
            assert_same(got, sample(logits, **arguments, backend="reference"))


@pytest.mark.parametrize("vocab", (151_936, 300_001))
def test_equals_the_reference_at_real_vocabularies(vocab):
    """Above 2^18 the masses have a bit less."""
    helpers.need("cpp")
    rows = [cases.make_rows(kind, 1, vocab, torch.float32) for kind in ("flat", "peaked")]
    logits = torch.cat(rows)
    for filters in ({"top_p": 0.95}, {"top_k": 5000, "min_p": 1e-3}):
        arguments = {**filters, "seed": torch.tensor([1, 2]), **EVERYTHING}
        got = sample(logits, **arguments, backend="cpp")
        assert_same(got, sample(logits, **arguments, backend="reference"))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_the_draw_inverts_the_exact_cumulative_masses(backend):
    """Token(u) is the step function of the integer masses, at each of many u: u is computed by
    exact Philox, masses and sums by exact arithmetic.
    """
    row = torch.cat([torch.randn(37) * 3, torch.tensor([-25.0, 9.0, -29.0])])
    draws = {"cpp": 200_000, "reference": 20_000}.get(backend, 300)
    seed = 12345
    out = sample(
        *(row[None],),
        top_k=30,
        num_samples=draws,
        seed=seed,
        position=6,
        backend=helpers.use(backend),
    )
    kept = sorted(cases.ranked(row)[:30])
    masses = cases.exact_masses(row)
    sums = list(itertools.accumulate(masses[token] for token in kept))
    for index, token in enumerate(out.tokens[0].tolist()):
        target = cases.exact_uniform(seed, 6, index) * sums[-1] >> 64
        assert token == kept[bisect.bisect_right(sums, target)], index


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_nothing_but_the_row_decides(backend):
    """Batch, order of rows, strides, threads, row_indices: the same token, rank and log-prob."""
    vocab = 70_001 if backend == "cpp" else 700
    logits = torch.cat(
        [cases.make_rows(kind, 2, vocab, torch.float32) for kind in ("flat", "peaked", "spread")]
    )
    seeds, filters = torch.arange(6), {"top_p": torch.tensor([1.0, 0.95, 0.9, 1.0, 0.99, 0.5])}

    def run(x: Tensor, rows: Tensor, **more) -> SampleOutput:
        picked = {name: value[rows] for name, value in filters.items()}
        arguments = {**picked, "seed": seeds[rows], "logprobs": "processed", "return_stats": True}
        return sample(x, **arguments, **more, backend=helpers.use(backend))

    everything, order = torch.arange(6), torch.tensor([3, 0, 5, 1, 4, 2])
    want = run(logits, everything)
    gapped = torch.empty(6, vocab + 3)
    gapped[:, 1 : vocab + 1] = logits
    runs = [
        (run(logits[order], order), order),
        (run(gapped[:, 1 : vocab + 1], everything), everything),
        (run(logits, order, row_indices=order), order),
        *((run(logits[i : i + 1], everything[i : i + 1]), everything[i : i + 1]) for i in (0, 3)),
    ]
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        runs.append((run(logits, everything), everything))
    torch.set_num_threads(threads)
    for got, rows in runs:
        for name in ("tokens", "rank", "logprobs", "num_kept", "entropy"):
            assert torch.equal(getattr(got, name), getattr(want, name)[rows]), name


def test_the_distribution_is_right_to_the_tail():
    """Four million draws: none outside the kept set, every frequency within six sigma, and the
    tokens of probability 1e-7 to 1e-5 as often as they should be.
    """
    helpers.need("cpp")
    row = torch.linspace(0, -16, 400)
    row[-1] = -math.inf
    filters = {"min_p": 2e-7}
    rows = torch.zeros(4, dtype=torch.int64)
    out = sample(
        row[None], **filters, row_indices=rows, seed=torch.arange(4), num_samples=1_000_000
    )
    counts = torch.bincount(out.tokens.flatten(), minlength=400).double()
    p = filter_logits(row, **filters).double().softmax(-1)
    assert bool((counts[p == 0] == 0).all()) and bool((p == 0).any())
    expected, draws = p * 4e6, 4e6
    sigma = (draws * p * (1 - p)).sqrt()
    often = expected > 25
    assert bool(((counts - expected)[often].abs() < 6 * sigma[often]).all())
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = int(often.sum()) - 1
    assert abs(float(chi_square) - freedom) < 6 * math.sqrt(2 * freedom)
    tail = (p > 1e-7) & (p < 1e-5)
    mass = float(p[tail].sum())
    assert tail.sum() > 50
    assert abs(float(counts[tail].sum()) - draws * mass) < 6 * math.sqrt(draws * mass)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_kept_set_is_that_of_filter_logits_and_scores_agree_with_token_logprobs(backend):
    z = cases.make_rows("peaked", 4, 600, torch.float32)
    filters = {"temperature": 0.8, "top_p": 0.97, "top_k": 100}
    out = sample(z, **filters, seed=torch.arange(4), **EVERYTHING, backend=helpers.use(backend))
    filtered = filter_logits(z, **filters, backend="reference")
    assert torch.equal(out.kept.to_mask(600), filtered > -math.inf)
    processed = token_logprobs(filtered, out.tokens, backend="reference")
    scaled = token_logprobs(z, out.tokens, temperature=0.8, backend="reference")
    raw = token_logprobs(z, out.tokens, backend="reference")
    close = {"atol": 3e-6, "rtol": 1e-6}
    torch.testing.assert_close(out.logprobs["processed"], processed.logprobs, **close)
    torch.testing.assert_close(out.logprobs["scaled"], scaled.logprobs, **close)
    torch.testing.assert_close(out.logprobs["raw"], raw.logprobs, **close)
    torch.testing.assert_close(out.entropy, processed.entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        out.kept_mass.log(), (scaled.logprobs - processed.logprobs), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_invalid_rows_are_flagged_alone(backend):
    z = torch.randn(5, 40)
    z[0, 3], z[2], z[3, 39] = math.nan, -math.inf, math.inf
    run = {"seed": torch.arange(5), **EVERYTHING, "backend": helpers.use(backend)}
    out = sample(z, top_p=0.9, **run)
    assert out.valid.tolist() == [False, True, False, False, True]
    bad = ~out.valid
    assert bool((out.tokens[bad] == -1).all()) and bool((out.num_kept[bad] == 0).all())
    assert bool((out.rank[bad] == 0).all()) and bool(out.entropy[bad].isnan().all())
    assert bool(out.logprobs["raw"][bad].isnan().all()) and bool(out.kept_mass[bad].isnan().all())
    good = sample(torch.randn(5, 40).copy_(z).nan_to_num(0, 0, 0), top_p=0.9, **run)
    assert torch.equal(out.tokens[~bad], good.tokens[~bad])
    # what is not allowed may hold anything
    masked = sample(z, allowed=z.isfinite(), top_p=0.9, **run)
    assert masked.valid.tolist() == [True, True, False, True, True]
    with pytest.raises(ValueError, match="logits row 0 holds NaN"):
        sample(z, on_invalid="raise", backend=run["backend"])


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_no_op_filters_and_masks_change_nothing(backend):
    z = cases.make_rows("ties", 3, 90, torch.bfloat16)
    run = {"seed": torch.arange(3), **EVERYTHING, "backend": helpers.use(backend)}
    want = sample(z, **run)
    for same in (
        {"top_k": 90, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 0, "order": "joint"},
        {"allowed": torch.ones(3, 90, dtype=torch.bool)},
        {"allowed": cases.pack_bits(torch.ones(90, dtype=torch.bool))},
    ):
        assert_same(sample(z, **same, **run), want)
    assert_same(sample(z + 8, **run), want._replace(logprobs=want.logprobs))
    mask = torch.rand(3, 90) < 0.5
    masked = torch.where(mask, z, -math.inf)
    assert_same(sample(z, allowed=mask, top_k=9, **run), sample(masked, top_k=9, **run))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_greedy_takes_the_first_of_equals(backend):
    z = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-1.0, -3.0, -1.0, -math.inf]])
    out = greedy(z, logprobs=True, backend=helpers.use(backend))
    assert out.tokens.tolist() == [1, 0]
    torch.testing.assert_close(out.logprobs, z.log_softmax(-1).amax(-1), atol=1e-6, rtol=1e-6)
    mixed = sample(
        *(z,),
        temperature=torch.tensor([0.0, 1.0]),
        seed=4,
        **EVERYTHING,
        backend=helpers.use(backend),
    )
    assert mixed.tokens[0] == 1 and mixed.num_kept.tolist() == [1, 3]
    assert mixed.logprobs["processed"][0] == 0 and mixed.kept_mass[0] == 1 and mixed.entropy[0] == 0
    assert greedy(z, allowed=torch.tensor([True, False, False, True])).tokens.tolist() == [3, 0]


def test_seeds():
    z = torch.zeros(64, 1000)
    torch.manual_seed(3)
    first = sample(z).tokens
    torch.manual_seed(3)
    assert torch.equal(first, sample(z).tokens) and len(first.unique()) > 50
    generator = torch.Generator().manual_seed(3)
    assert not torch.equal(
        sample(z, generator=generator).tokens, sample(z, generator=generator).tokens
    )
    assert len(sample(z, seed=7).tokens.unique()) == 1  # one seed, one random number
    assert len(sample(z, seed=7, position=torch.arange(64)).tokens.unique()) > 50
    several = sample(z[:1], seed=7, num_samples=64).tokens
    assert several.shape == (1, 64) and len(several.unique()) > 50
    assert several[0, 0] == sample(z[:1], seed=7).tokens[0]


def test_leading_shape_and_row_indices():
    z = cases.make_rows("spread", 6, 50, torch.float32).reshape(2, 3, 50)
    out = sample(z, seed=torch.arange(6).reshape(2, 3), num_samples=4, **EVERYTHING)
    assert out.tokens.shape == out.rank.shape == out.logprobs["raw"].shape == (2, 3, 4)
    assert out.valid.shape == out.entropy.shape == (2, 3) and out.kept.num_rows == 6
    rows = torch.tensor([5, 5, 0, 5])
    again = sample(z, row_indices=rows, seed=rows, num_samples=4, **EVERYTHING)
    assert torch.equal(again.tokens, out.tokens.reshape(6, 4)[rows])
    assert sample(z[:0]).tokens.shape == (0, 3)


def test_calls_from_several_threads_and_modes_agree():
    z = cases.make_rows("peaked", 8, 20_000, torch.float32)
    run = {"top_p": 0.95, "seed": torch.arange(8), "logprobs": "processed"}
    want = sample(z, **run)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: sample(z, **run), range(16)):
            assert torch.equal(got.tokens, want.tokens)
    with torch.inference_mode():
        assert torch.equal(sample(z, **run).tokens, want.tokens)
    assert torch.equal(sample(z.clone().requires_grad_(), **run).tokens, want.tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"seed": 2**63}, "seed must be an int64"),
        ({"position": -1}, "position must be an int64, 0 or more"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1"),
        ({"logprobs": "log"}, "logprobs must be of raw, scaled, processed"),
        ({"on_invalid": "skip"}, "on_invalid must be 'flag' or 'raise'"),
        ({"row_indices": torch.tensor([2])}, r"row_indices must be in \[0, 2\)"),
        ({"row_indices": torch.zeros(1, 1, dtype=torch.int64)}, r"row_indices must be \[N\]"),
        ({"allowed": torch.ones(2, 4, dtype=torch.bool)}, r"allowed must be \[2, 5\] or \[5\]"),
        ({"allowed": torch.ones(2, 5, dtype=torch.int32)}, r"allowed must be \[2, 1\] or \[1\]"),
        ({"seed": 1, "generator": torch.Generator()}, "generator draws the seeds"),
        ({"backend": "cuda"}, "the tensors are on cpu"),
    ),
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(2, 5), **arguments)
    with pytest.raises(TypeError, match="allowed must be one of bool, int32"):
        sample(torch.zeros(2, 5), allowed=torch.ones(2, 5))


def test_kept_tokens_to_and_from_masks():
    mask = torch.rand(5, 70) < 0.2
    mask[2] = False
    kept = KeptTokens.from_mask(mask)
    assert torch.equal(kept.to_mask(70), mask) and torch.equal(kept.counts, mask.sum(-1))
    assert kept.token_ids.dtype == torch.int32 and kept.offsets.dtype == torch.int64
    assert KeptTokens.from_mask(mask[:0]).to_mask(70).shape == (0, 70)
    with pytest.raises(ValueError, match="vocab must exceed every token id"):
        kept.to_mask(3)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        KeptTokens.from_mask(mask.float())


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_what_is_asked_for_does_not_depend_on_what_else_is(backend):
    """Top-k rows, greedy rows and whole rows; a field that was not asked for is None."""
    helpers.use(backend)
    logits = 3 * torch.randn(4, 900)
    filters = {"top_k": torch.tensor([5, 0, 20, 5]), "temperature": torch.tensor([1.0, 0.7, 2, 0])}
    given = {**filters, "seed": torch.arange(4), "backend": backend}
    every = sample(logits, **given, **EVERYTHING)
    for kind, stats in (
        ("processed", "rank"),
        ("processed", ("rank", "entropy")),
        ("raw", "rank"),
        ("scaled", False),
        (None, "kept_mass"),
        (None, ["entropy"]),
    ):
        out = sample(logits, **given, logprobs=kind, return_stats=stats)
        assert torch.equal(out.tokens, every.tokens)
        if kind is not None:
            helpers.assert_close(out.logprobs, every.logprobs[kind], 0, kind)
        names = (stats,) if isinstance(stats, str) else stats or ()
        for name in ("rank", "kept_mass", "entropy"):
            value = getattr(out, name)
            assert (value is None) == (name not in names)
            if value is not None:
                helpers.assert_close(value, getattr(every, name), 0, name)


def test_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match="return_stats must be of rank, kept_mass, entropy, got"):
        sample(torch.zeros(1, 3), return_stats=("rank", "mass"))
