"""beam_step: candidates of log-softmax and sort, ties, masks, widths, groups, dropped beams."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from pyllmtune import BeamStep, beam_step, token_logprobs
from tests import decoding_cases as cases
from tests import helpers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF, NAN = math.inf, math.nan


def assert_same(got: BeamStep, want: BeamStep, dtype: torch.dtype) -> None:
    """Scores to rounding; tokens and parents exactly, except where a neighbour's score is so near
    that rounding may have ordered or cut the two otherwise.
    """
    assert torch.equal(got.valid, want.valid)
    helpers.assert_close(got.scores, want.scores, helpers.FORWARD[dtype], "scores")
    size = torch.where(want.scores.isfinite(), want.scores, 0.0).abs().amax() if len(got[0]) else 1
    near = 2 * helpers.FORWARD[dtype] * max(1.0, float(size))
    gap = (want.scores[:, :-1] - want.scores[:, 1:]).abs()  # NaN between empty slots
    alone = torch.ones_like(want.is_eos)
    alone[:, 1:] &= ~(gap <= near)
    alone[:, :-1] &= ~(gap <= near)
    for name in ("tokens", "parents", "is_eos"):
        assert bool((getattr(got, name) == getattr(want, name))[alone].all()), name
    assert torch.equal(got.tokens < 0, want.tokens < 0)


def make_scores(pick: random.Random, batch: int, beams: int) -> Tensor:
    scores = torch.randn(batch, beams) * 3 - 5
    if pick.random() < 0.4:
        scores[torch.rand(batch, beams) < 0.4] = -INF  # finished
    return scores


def random_options(pick: random.Random, batch: int, beams: int, vocab: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "allowed": cases.random_allowed(pick, batch * beams, vocab),
        "renormalize": pick.random() < 0.5,
        "eos_token_id": pick.choice((None, 0, [0, vocab - 1], torch.tensor(vocab // 2))),
        "temperature": pick.choice((1.0, 1.0, 0.3, 2.0, torch.rand(batch * beams) + 0.3)),
        "num_candidates": pick.choice((None, None, beams, 7 * beams)),
    }
    if pick.random() < 0.3:
        options["widths"] = torch.randint(0, beams + 1, (batch,))
    elif pick.random() < 0.5:
        options["num_groups"] = pick.choice([n for n in range(1, beams + 1) if beams % n == 0])
        options["diversity_penalty"] = pick.choice((0.0, 0.4, 5.0))
    return options


@pytest.mark.parametrize("kind", cases.ROW_KINDS)
@helpers.pairs(helpers.KERNELS, DTYPES)
def test_equals_the_reference(backend, kind, dtype):
    """Random masks, temperatures, widths, groups, finished beams, numbers of candidates."""
    pick = random.Random(f"{kind}{dtype}")
    sizes = (1, 2, 17, 255, 256, 257, 1000, 40_000) if backend == "cpp" else (1, 33, 300)
    for vocab in sizes:
        for _ in range(6 if backend == "cpp" and vocab <= 1000 else 1):
            batch, beams = pick.choice((1, 2)), pick.choice((1, 2, 3, 4, 6))
            logits = cases.make_rows(kind, batch * beams, vocab, dtype)
            scores = make_scores(pick, batch, beams)
            options = random_options(pick, batch, beams, vocab) | {"num_beams": beams}
            got = beam_step(logits, scores, **options, backend=helpers.use(backend))
            want = beam_step(logits, scores, **options, backend="reference")
            assert_same(got, want, dtype)


@pytest.mark.parametrize("kind", ("flat", "equal"))
@pytest.mark.parametrize("backend", ("triton", "emulated"))
def test_rows_of_several_parts(backend, kind):
    """A row is split, and of equal logits more reach the bound than a list has room for."""
    logits = cases.make_rows(kind, 2, 9001, torch.float32)
    scores = torch.tensor([[-1.0, -1.5]])
    options = {"num_beams": 2, "eos_token_id": 3}
    got = beam_step(logits, scores, **options, backend=helpers.use(backend))
    assert_same(got, beam_step(logits, scores, **options, backend="reference"), torch.float32)


@pytest.mark.parametrize("vocab", (151_936, 262_144))
def test_equals_log_softmax_and_topk_at_real_vocabularies(vocab):
    helpers.need("cpp")
    logits, scores = torch.randn(2, 3, vocab) * 2, torch.randn(2, 3)
    total = (logits.double().log_softmax(-1) + scores.double()[..., None]).flatten(1)
    want = total.topk(6)
    got = beam_step(logits, scores, num_beams=3, backend="cpp")
    helpers.assert_close(got.scores, want.values, helpers.FORWARD[torch.float32], "scores")
    assert torch.equal(got.parents * vocab + got.tokens, want.indices)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_scores_are_those_of_token_logprobs(backend):
    """At a temperature: the parent's score plus the log-prob of the token."""
    logits, scores = torch.randn(2, 3, 50) * 4, torch.randn(2, 3)
    out = beam_step(logits, scores, num_beams=3, temperature=0.7, backend=helpers.use(backend))
    rows = logits.gather(1, out.parents[..., None].expand(-1, -1, 50))
    logprobs = token_logprobs(rows.double(), out.tokens, temperature=0.7).logprobs
    want = scores.double().gather(1, out.parents) + logprobs
    helpers.assert_close(out.scores, want, helpers.FORWARD[torch.float32], "scores")


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_ties_go_to_the_lower_beam_then_the_lower_id(backend):
    logits = torch.zeros(2, 3, 40)
    logits[1, :, 20:] = 1.0
    logits[1, 0] = -INF
    logits[1, 0, 7] = 0.0
    scores = torch.tensor([[0.0, 0.0, 0.0], [-9.0, 0.0, 0.0]])
    out = beam_step(logits, scores, num_beams=3, num_candidates=45, backend=helpers.use(backend))
    assert out.parents[0].tolist() == [0] * 40 + [1] * 5
    assert out.tokens[0].tolist() == [*range(40), *range(5)]
    assert out.parents[1].tolist() == [1] * 20 + [2] * 20 + [1] * 5
    assert out.tokens[1].tolist() == [*range(20, 40), *range(20, 40), *range(5)]


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_finished_beams_are_not_looked_at(backend):
    """The first step of a search: one beam; later: a finished one full of NaN."""
    logits = torch.randn(3, 2, 30)
    logits[0, 1] = NAN
    scores = torch.tensor([[-2.0, -INF], [-INF, -INF], [-1.0, -1.0]])
    out = beam_step(logits, scores, num_beams=2, eos_token_id=0, backend=helpers.use(backend))
    assert bool(out.valid.all())
    alone = beam_step(logits[:1, :1], scores[:1, :1], num_beams=1, num_candidates=4)
    assert torch.equal(out.tokens[0], alone.tokens[0]) and not out.parents[0].any()
    assert_empty(out, 1, 0)
    assert bool((out.tokens[2] >= 0).all())


def assert_empty(out: BeamStep, item: int, first: int) -> None:
    """Every slot from ``first`` on."""
    assert bool((out.scores[item, first:] == -INF).all())
    assert bool((out.tokens[item, first:] == -1).all())
    assert not out.parents[item, first:].any() and not out.is_eos[item, first:].any()


@helpers.pairs(helpers.BACKENDS, DTYPES)
def test_a_bad_beam_is_dropped_and_flagged_and_its_neighbours_are_unharmed(backend, dtype):
    """NaN, +inf, nothing allowed; a score that is NaN or +inf."""
    logits = torch.randn(4, 3, 65).to(dtype)
    scores = torch.randn(4, 3)
    clean = logits.clone(), scores.clone()
    logits[0, 1, 40], logits[1, 2, 64], logits[1, 0, 0] = NAN, INF, -NAN
    logits[2, 1] = -INF
    scores[3, 0], scores[3, 2] = NAN, INF
    bad = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
    out = beam_step(logits, scores, num_beams=3, backend=helpers.use(backend))
    assert torch.equal(out.valid, ~bad)
    scores = torch.where(bad, -INF, clean[1])
    want = beam_step(clean[0], scores, num_beams=3, backend=backend)
    for name in ("scores", "tokens", "parents"):
        assert torch.equal(getattr(out, name), getattr(want, name)), name


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_masks_before_or_after_the_softmax(backend):
    """What is not allowed may hold NaN if the softmax is over the allowed tokens alone."""
    logits, scores = torch.randn(1, 2, 40), torch.tensor([[-1.0, -2.0]])
    allowed = torch.zeros(40, dtype=torch.bool)
    allowed[[3, 20, 39]] = True
    options = {"num_beams": 2, "allowed": allowed, "backend": helpers.use(backend)}
    after = beam_step(logits, scores, renormalize=False, **options)
    total = (logits.double().log_softmax(-1) + scores.double()[..., None])[..., allowed]
    want = total.flatten().sort(descending=True).values[:4]
    helpers.assert_close(after.scores[0], want, helpers.FORWARD[torch.float32], "after")

    spoiled = torch.where(allowed, logits, NAN)
    before = beam_step(spoiled, scores, **options)
    total = logits.double()[..., allowed].log_softmax(-1) + scores.double()[..., None]
    want = total.flatten().sort(descending=True).values[:4]
    helpers.assert_close(before.scores[0], want, helpers.FORWARD[torch.float32], "before")
    assert bool(before.valid.all())
    assert not beam_step(spoiled, scores, renormalize=False, **options).valid.any()

    nothing = options | {"allowed": torch.zeros_like(allowed)}
    out = beam_step(logits, scores, **nothing)
    assert not out.valid.any()
    assert_empty(out, 0, 0)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_a_vocabulary_smaller_than_the_width(backend):
    logits, scores = torch.randn(2, 4, 3), torch.randn(2, 4)
    options = {"num_beams": 4, "backend": helpers.use(backend)}
    out = beam_step(logits, scores, num_candidates=20, **options)
    assert_empty(out, 0, 12)
    found = {*zip(out.parents[0, :12].tolist(), out.tokens[0, :12].tolist(), strict=True)}
    assert found == {*itertools.product(range(4), range(3))}
    one = beam_step(torch.randn(2, 4, 1), scores, eos_token_id=0, **options)  # V = 1: log-prob 0
    assert torch.equal(one.scores[:, :4], scores.sort(descending=True).values)
    assert bool(one.is_eos[:, :4].all())
    assert_empty(one, 1, 4)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_enough_candidates_go_on_though_every_beam_may_end(backend):
    """EOS is the best token everywhere: 2 * num_beams hold num_beams that do not end."""
    logits, scores = torch.randn(2, 3, 33), torch.randn(2, 3)
    logits[..., [5, 9]] = 20.0
    options = {"num_beams": 3, "backend": helpers.use(backend)}
    for eos, slots in ((5, 6), ([5, 9], 9)):
        out = beam_step(logits, scores, eos_token_id=eos, **options)
        assert out.tokens.shape[1] == slots
        ids = torch.tensor(eos).reshape(-1)
        assert torch.equal(out.is_eos, torch.isin(out.tokens, ids))
        assert bool(((~out.is_eos).sum(-1) >= 3).all())


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_widths_are_beams_and_candidates_of_an_item(backend):
    logits, scores = torch.randn(4, 3, 50), torch.randn(4, 3)
    widths = torch.tensor([0, 1, 2, 3])
    options = {"eos_token_id": 1, "backend": helpers.use(backend)}
    out = beam_step(logits, scores, num_beams=3, widths=widths, **options)
    for item, width in enumerate(widths.tolist()):
        assert_empty(out, item, 2 * width)
        if width == 0:
            continue
        own = slice(item, item + 1)
        want = beam_step(logits[own, :width], scores[own, :width], num_beams=width, **options)
        for name in ("scores", "tokens", "parents", "is_eos"):
            assert torch.equal(getattr(out, name)[item, : 2 * width], getattr(want, name)[0]), name


def groups_by_hand(
    logits: Tensor, scores: Tensor, groups: int, penalty: float, eos: int
) -> list[tuple[int, int]]:
    """Vijayakumar et al. for one item: a dictionary of what earlier groups took, and a sort."""
    beams, vocab = logits.shape
    size = beams // groups
    total = (logits.double().log_softmax(-1) + scores.double()[:, None]).tolist()
    taken: dict[int, int] = {}
    found = []
    for group in range(groups):
        pairs = itertools.product(range(group * size, (group + 1) * size), range(vocab))
        ranked = sorted(pairs, key=lambda p: -(total[p[0]][p[1]] - penalty * taken.get(p[1], 0)))
        best = ranked[: 2 * size]
        found += best
        for _, token in [pair for pair in best if pair[1] != eos][:size]:
            taken[token] = taken.get(token, 0) + 1
    return found


@pytest.mark.parametrize("penalty", (0.0, 0.5, 10.0))
@pytest.mark.parametrize("groups", (1, 2, 3, 6))
@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_groups_avoid_what_earlier_groups_go_on_with(backend, groups, penalty):
    """Against the definition; beams that agree, so that the penalty decides."""
    logits = torch.randn(1, 1, 40) + 0.05 * torch.randn(2, 6, 40)
    scores = torch.randn(2, 6) * 0.1
    out = beam_step(
        *(logits, scores),
        num_beams=6,
        eos_token_id=4,
        num_groups=groups,
        diversity_penalty=penalty,
        backend=helpers.use(backend),
    )
    for item in range(2):
        want = groups_by_hand(logits[item], scores[item], groups, penalty, 4)
        assert [*zip(out.parents[item].tolist(), out.tokens[item].tolist(), strict=True)] == want
    total = logits.double().log_softmax(-1) + scores.double()[..., None]
    want = total.flatten(1).gather(1, out.parents * 40 + out.tokens)  # without the penalty
    helpers.assert_close(out.scores, want, helpers.FORWARD[torch.float32], "scores")


@pytest.mark.parametrize("backend", helpers.KERNELS)
def test_nothing_but_the_item_decides(backend):
    """Batch, order of items, strides, threads: the same bits."""
    vocab = 70_001 if backend == "cpp" else 500
    logits, scores = torch.randn(5, 2, vocab), torch.randn(5, 2)

    def run(rows: Tensor, of: Tensor) -> BeamStep:
        return beam_step(rows, of, num_beams=2, temperature=0.9, backend=helpers.use(backend))

    want, order = run(logits, scores), torch.tensor([3, 0, 4, 1, 2])
    wide = torch.empty(5, 2, vocab + 3)
    wide[..., 1 : vocab + 1] = logits
    runs = [(run(logits[order], scores[order]), order), (run(logits[2:3], scores[2:3]), [2])]
    if backend != "triton":  # there a layout, and with it a sum, follows from the alignment
        runs.append((run(wide[..., 1 : vocab + 1], scores), slice(None)))
    runs.append((run(logits.flatten(0, 1), scores.flatten()), slice(None)))
    runs.append((run(logits.transpose(0, 1).contiguous().transpose(0, 1), scores), slice(None)))
    threads = torch.get_num_threads()
    for count in (1, 2, 5) if backend == "cpp" else ():
        torch.set_num_threads(count)
        runs.append((run(logits, scores), slice(None)))
    torch.set_num_threads(threads)
    for got, rows in runs:
        assert all(torch.equal(a, b[rows]) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_no_items(backend):
    out = beam_step(torch.zeros(0, 7), torch.zeros(0, 2), num_beams=2, backend=helpers.use(backend))
    assert out.scores.shape == (0, 4) and out.valid.shape == (0, 2)


def test_a_score_that_is_minus_infinity_is_no_candidate():
    """(z - max) / T beyond float32: only the best token of the beam is left."""
    logits = torch.tensor([[[0.0, -3e38, 1e38]]])
    for backend in ("reference", "cpp"):
        out = beam_step(
            logits,
            torch.zeros(1, 1),
            num_beams=1,
            temperature=1e-3,
            backend=helpers.use(backend),
        )
        assert out.tokens.tolist() == [[2, -1]]


LOGITS, SCORES = torch.zeros(2, 3, 5), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    (
        ({"num_beams": 0}, ValueError, "num_beams must be an integer of at least 1, got 0"),
        ({"num_beams": 4}, ValueError, r"logits must be \[batch, 4, V\] or \[batch \* 4, V\]"),
        ({"beam_scores": torch.zeros(2, 4)}, ValueError, r"beam_scores must be \[2, 3\] or \[6\]"),
        ({"beam_scores": torch.zeros(2, 3).long()}, TypeError, "beam_scores must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must be \[2, 3\]"),
        ({"num_candidates": 0}, ValueError, "num_candidates must be an integer of at least 1"),
        ({"eos_token_id": "x"}, TypeError, "eos_token_id must be an integer or several"),
        ({"eos_token_id": torch.zeros(1, 1).long()}, ValueError, "eos_token_id must be one id"),
        ({"allowed": torch.ones(4).bool()}, ValueError, r"allowed must be \[2, 3, 5\] or \[5\]"),
        ({"widths": 2}, TypeError, "widths must be a torch.Tensor"),
        ({"widths": torch.tensor([1, 4])}, ValueError, r"widths must be in \[0, num_beams=3\]"),
        ({"num_groups": 2}, ValueError, "num_groups must divide num_beams and num_candidates"),
        ({"diversity_penalty": -1.0}, ValueError, "diversity_penalty must be finite, 0 or more"),
        ({"num_groups": 3, "widths": torch.ones(2).long()}, ValueError, "widths are for one group"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ),
)
def test_bad_arguments_are_named(change, error, words):
    options = {"logits": LOGITS, "beam_scores": SCORES, "num_beams": 3} | change
    with pytest.raises(error, match=words):
        beam_step(**options)
