"""sample_beams: what is drawn without replacement, and that it is the same everywhere."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyllmtune import beam_search, beam_step, sample, sample_beams, token_logprobs
from tests import decoding_cases, helpers
from tests.test_beam_search import Table

INF, NAN = math.inf, math.nan


def probability_of_sets(weights: Tensor, size: int) -> dict[tuple[int, ...], float]:
    """Of each set that drawing ``size`` of these without replacement can give: over its orders."""
    p = (weights.double() / weights.double().sum()).tolist()
    found = {}
    for chosen in itertools.combinations(range(len(p)), size):
        total = 0.0
        for order in itertools.permutations(chosen):
            left, product = 1.0, 1.0
            for one in order:
                product *= p[one] / left
                left -= p[one]
            total += product
        found[chosen] = total
    return found


def chi_square(sets: Tensor, expected: dict[tuple[int, ...], float]) -> float:
    drawn = [tuple(sorted(row)) for row in sets.tolist()]
    assert set(drawn) <= expected.keys()
    counts = {one: 0 for one in expected}
    for one in drawn:
        counts[one] += 1
    mean = {one: len(drawn) * share for one, share in expected.items()}
    return sum((counts[one] - mean[one]) ** 2 / mean[one] for one in expected)


@pytest.mark.parametrize("backend", helpers.BACKENDS[:2])
def test_sets_have_the_probabilities_of_drawing_without_replacement(backend):
    """Two beams of four tokens, three drawn: 56 sets; the 99.9 % point of 55 degrees is 93.2."""
    items = 40_000
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5], [2.5, -0.5, 0.0, -2.0]])
    scores = torch.tensor([-0.3, -1.2])
    out = sample_beams(
        logits.expand(items, 2, 4),
        scores.expand(items, 2),
        num_beams=2,
        num_candidates=3,
        temperature=0.8,
        seed=torch.arange(items),
        backend=helpers.use(backend),
    )
    sets = out.parents * 4 + out.tokens
    whole = (scores[:, None] + (logits / 0.8).log_softmax(-1)).flatten().exp()
    assert chi_square(sets, probability_of_sets(whole, 3)) < 93.2
    # the test is able to fail: the same beams with equal scores would be told apart
    equal = (logits / 0.8).log_softmax(-1).flatten().exp()
    assert chi_square(sets, probability_of_sets(equal, 3)) > 1000
    want = (scores[:, None] + (logits / 0.8).log_softmax(-1)).flatten()[sets]
    helpers.assert_close(out.scores, want, 2e-6, "scores")


def test_drawing_all_is_beam_step():
    """Of as many as there are, every score, token and parent; sorted, since they come as drawn."""
    logits, scores = torch.randn(3, 2, 40) * 3, torch.randn(3, 2)
    options = {"num_beams": 2, "num_candidates": 90, "eos_token_id": [0, 7], "temperature": 0.7}
    allowed = torch.rand(3, 2, 40) < 0.7
    for mask in (None, allowed, decoding_cases.pack_bits(allowed)):
        got = sample_beams(logits, scores, allowed=mask, seed=5, **options)
        order = got.scores.argsort(-1, descending=True)
        assert not torch.equal(order, torch.arange(90).expand(3, 90))
        got = got._replace(
            **{name: getattr(got, name).gather(-1, order) for name in got._fields[:4]}
        )
        want = beam_step(logits, scores, allowed=mask, **options)
        helpers.assert_close(got.scores, want.scores, 2e-6, "scores")
        for name in ("tokens", "parents", "is_eos", "valid"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("backend", helpers.KERNELS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=helpers.dtype_id)
def test_the_same_on_every_backend_and_in_any_batch(backend, dtype):
    logits = (torch.randn(3, 2, 301) * 3).to(dtype)
    scores, seeds = torch.randn(3, 2), torch.tensor([4, -9, 2**62])
    options = {"num_beams": 2, "position": 6, "backend": helpers.use(backend)}
    got = sample_beams(logits, scores, seed=seeds, **options)
    want = sample_beams(logits, scores, seed=seeds, **options | {"backend": "reference"})
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.parents, want.parents)
    helpers.assert_close(got.scores, want.scores, 2e-6, "scores")
    for item in range(3):
        alone = sample_beams(logits[item], scores[item], seed=seeds[item : item + 1], **options)
        for one, all_of_them in zip(alone, got, strict=True):
            assert torch.equal(one, all_of_them[item : item + 1])


def test_its_first_draw_is_that_of_sample():
    logits, seeds = torch.randn(50, 99) * 2, torch.arange(50)
    out = sample_beams(logits, torch.zeros(50, 1), num_beams=1, num_candidates=1, seed=seeds)
    assert torch.equal(out.tokens, sample(logits, seed=seeds).tokens[:, None])
    other = sample_beams(
        *(logits, torch.zeros(50, 1)), num_beams=1, num_candidates=1, seed=seeds, position=1
    )
    assert not torch.equal(out.tokens, other.tokens)


def test_rare_tokens_behind_a_certain_one():
    """What is left of a row beside a token of probability 1 - 1e-9 is drawn by its own shares."""
    items = 3000
    logits = torch.tensor([21.0, 0.0, -1.0, 0.0]).expand(items, 1, 4)
    out = sample_beams(
        logits, torch.zeros(items, 1), num_beams=1, num_candidates=2, seed=torch.arange(items)
    )
    assert bool((out.tokens[:, 0] == 0).all())
    second = out.tokens[:, 1]
    share = 1 / (2 + math.exp(-1))
    for token in (1, 3):
        count = int((second == token).sum())
        assert abs(count - items * share) < 4 * math.sqrt(items * share * (1 - share))
    helpers.assert_close(
        out.scores, logits[0].double().log_softmax(-1)[0][out.tokens], 2e-6, "scores"
    )


def test_bad_finished_and_empty_beams():
    logits = torch.randn(3, 2, 3)
    logits[0, 0, 1] = NAN  # dropped and flagged
    logits[1, 1] = NAN  # finished: not looked at
    logits[2, 0] = -INF  # nothing allowed
    scores = torch.tensor([[-1.0, -2.0], [-1.0, -INF], [-1.0, INF]])
    out = sample_beams(logits, scores, num_beams=2, seed=1)
    assert out.valid.tolist() == [[False, True], [True, True], [False, False]]
    assert (out.tokens >= 0).sum(-1).tolist() == [3, 3, 0]
    assert out.parents[0, :3].tolist() == [1, 1, 1] and out.parents[1, :3].tolist() == [0, 0, 0]
    assert sorted(out.tokens[0, :3].tolist()) == [0, 1, 2]
    assert bool((out.scores[2] == -INF).all()) and not bool(out.is_eos.any())
    empty = sample_beams(torch.zeros(0, 2, 3), torch.zeros(0, 2), num_beams=2, seed=1)
    assert empty.tokens.shape == (0, 4)


def test_seeds():
    logits, scores = torch.randn(4, 2, 50), torch.zeros(4, 2)
    draw = {"num_beams": 2}
    torch.manual_seed(3)
    first = sample_beams(logits, scores, **draw)
    torch.manual_seed(3)
    assert torch.equal(first.tokens, sample_beams(logits, scores, **draw).tokens)
    one = sample_beams(logits[:1].expand(4, 2, 50), scores, seed=8, **draw)
    assert bool((one.tokens == one.tokens[:1]).all())  # one seed: the same numbers for every item
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(
        sample_beams(logits, scores, generator=generator, **draw).tokens, first.tokens
    )


def test_bad_arguments_are_named():
    z, s = torch.randn(4, 9), torch.zeros(2, 2)
    for words, message in (
        ({"num_beams": 3}, r"logits must be \[batch, 3, V\]"),
        ({"num_beams": 0}, "num_beams must be an integer of at least 1"),
        ({"num_candidates": 0}, "num_candidates must be"),
        ({"position": -1}, r"position must be in \[0, 2\^40\)"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"seed": torch.tensor([1, 2, 3])}, "seed must have shape"),
        ({"seed": 1, "generator": torch.Generator()}, "generator draws the seeds"),
        ({"allowed": torch.ones(5, dtype=torch.bool)}, "allowed must be"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_beams(z, s, **{"num_beams": 2} | words)
    with pytest.raises(ValueError, match=r"beam_scores must be \[2, 2\]"):
        sample_beams(z, torch.zeros(3, 2), num_beams=2)


@pytest.mark.parametrize("backend", helpers.BACKENDS[:2])
def test_beam_search_with_sampling(backend):
    """Scores are sums of log-probs of the sequence; seeds repeat it; prompts have their own."""
    helpers.use(backend)
    model, start = Table(9, 5), torch.tensor([[1, 2]] * 6)
    words = {"num_beams": 3, "max_length": 4, "eos_token_id": 0, "do_sample": True}

    def search(**more):
        return beam_search(model.step, start, **words, **more, backend=backend)

    out = search(seed=torch.arange(6), num_return_sequences=2)
    for item, rank in itertools.product(range(6), range(2)):
        answer = out.tokens[item, rank, : out.lengths[item, rank]].tolist()
        want = model.logprobs([1, 2], answer)
        helpers.assert_close(out.logprobs[item, rank, : len(answer)], want, 1e-5, "log-probs")
        helpers.assert_close(out.scores[item, rank], want.sum(), 1e-5, "score")
    again = search(seed=torch.arange(6), num_return_sequences=2)
    assert torch.equal(out.tokens, again.tokens)
    assert len({tuple(row) for row in out.tokens[:, 0].tolist()}) > 1  # not the best: drawn
    same = search(seed=7)
    assert bool((same.tokens == same.tokens[:1]).all())


def test_beam_search_says_what_sampling_cannot_be_combined_with():
    words = {"num_beams": 2, "max_length": 2, "eos_token_id": 0}
    table, start = Table(5, 3), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="seed and generator are for do_sample=True"):
        beam_search(table.step, start, **words, seed=1)
    with pytest.raises(ValueError, match="do_sample draws from one group"):
        beam_search(table.step, start, **words, do_sample=True, num_groups=2)


def test_token_logprobs_of_what_was_drawn():
    logits, scores = torch.randn(2, 3, 70) * 2, torch.randn(2, 3)
    out = sample_beams(logits, scores, num_beams=3, seed=2)
    rows = logits.gather(1, out.parents[..., None].expand(-1, -1, 70))
    logprobs = token_logprobs(rows.double(), out.tokens).logprobs
    helpers.assert_close(out.scores, scores.gather(1, out.parents) + logprobs, 2e-6, "scores")
