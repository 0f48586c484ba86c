"""beam_search where little or nothing is possible, and what it says about bad arguments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyllmtune import beam_search
from tests.helpers import use

BACKENDS = ("reference", "cpp")


def fixed(logits: Tensor):
    """A model that always says the same."""
    return lambda tokens, cache: logits.expand(len(tokens), -1)


ONE = torch.tensor([[1]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_eos_at_once(backend):
    """Every beam's best token ends: the first hypothesis is the ending token alone."""
    use(backend)
    step = fixed(torch.tensor([9.0, 1.0, 0.0, -1.0]))
    out = beam_search(step, ONE, num_beams=3, max_length=5, eos_token_id=0, backend=backend)
    assert out.tokens.tolist() == [[[0]]] and out.lengths.tolist() == [[1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_eos_is_possible(backend):
    """One sequence and no more: the others that were asked for are empty."""
    use(backend)
    step = fixed(torch.tensor([0.0, -math.inf, -math.inf]))
    words = {"num_beams": 3, "num_return_sequences": 3, "max_length": 5, "pad_token_id": 2}
    out = beam_search(step, ONE, **words, eos_token_id=0, backend=backend)
    assert out.lengths.tolist() == [[1, 0, 0]]
    assert out.scores.tolist() == [[0.0, -math.inf, -math.inf]]
    assert out.tokens.tolist() == [[[0], [2], [2]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_of_one(backend):
    use(backend)
    step = fixed(torch.tensor([3.0]))
    words = {"num_beams": 2, "num_return_sequences": 2, "max_length": 4, "backend": backend}
    out = beam_search(step, torch.zeros(1, 1, dtype=torch.int64), **words, eos_token_id=None)
    assert out.tokens[0, 0].tolist() == [0, 0, 0, 0] and out.lengths.tolist() == [[4, 0]]
    ended = beam_search(step, torch.zeros(1, 1, dtype=torch.int64), **words, eos_token_id=0)
    assert ended.lengths.tolist() == [[1, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_wider_than_the_vocabulary(backend):
    """More beams than tokens: every sequence of three tokens out of two, in order."""
    use(backend)
    step = fixed(torch.tensor([0.0, 1.0]))
    words = {"num_beams": 8, "num_return_sequences": 8, "max_length": 3, "backend": backend}
    out = beam_search(step, ONE, **words, eos_token_id=None)
    assert sorted(out.tokens[0].tolist()) == [list(t) for t in itertools.product((0, 1), repeat=3)]
    assert float(out.scores.exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_beam_ends_alone(backend, bad):
    """NaN, +inf or nothing allowed after token 2: sequences through it are not found, the others
    are those of a model that never says 2 (with the probability that 2 had).
    """
    use(backend)
    table = torch.randn(5, 5)

    def step(tokens, cache):
        logits = table[tokens[:, -1]].clone()
        logits[tokens[:, -1] == 2] = bad
        return logits

    words = {"num_beams": 3, "num_return_sequences": 3, "max_length": 4, "eos_token_id": 0}
    out = beam_search(step, ONE, **words, early_stopping="never", backend=backend)
    assert (out.lengths > 0).all() and out.scores.isfinite().all()
    for rank in range(3):
        answer = out.tokens[0, rank, : out.lengths[0, rank]].tolist()
        assert 2 not in answer[:-1]
        previous = torch.tensor([1, *answer[:-1]])
        total = table.log_softmax(-1)[previous, answer].sum()
        assert float(out.scores[0, rank]) == pytest.approx(float(total), abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_possible_in_one_item(backend):
    """All of it masked or NaN: that item is empty, the other as if alone."""
    use(backend)
    good, words = torch.randn(6), {"num_beams": 3, "max_length": 3, "eos_token_id": 0}
    for bad in (-math.inf, math.nan):

        def step(tokens, cache, bad=bad):
            rows = len(tokens) // 2
            return torch.cat((torch.full((rows, 6), bad), good.expand(rows, -1)))

        out = beam_search(step, torch.ones(2, 1, dtype=torch.int64), **words, backend=backend)
        alone = beam_search(fixed(good), ONE, **words, backend=backend)
        assert out.lengths[0].tolist() == [0] and out.scores[0].tolist() == [-math.inf]
        assert torch.equal(out.scores[1], alone.scores[0])
        assert torch.equal(out.tokens[1], alone.tokens[0])


def test_minimum_length_keeps_the_log_probs():
    """EOS is out of the question before it; the others' log-probs are those of the model."""
    step = fixed(torch.tensor([9.0, 1.0, 0.0]))
    out = beam_search(step, ONE, num_beams=2, max_length=6, min_length=4, eos_token_id=0)
    assert out.tokens.tolist() == [[[1, 1, 1, 0]]]
    logprobs = torch.tensor([9.0, 1.0, 0.0]).log_softmax(-1)
    assert torch.allclose(out.logprobs[0, 0], logprobs[[1, 1, 1, 0]], atol=1e-5)


def test_maximum_length_finishes_what_runs():
    step = fixed(torch.tensor([-9.0, 1.0, 0.0]))
    words = {"num_beams": 2, "num_return_sequences": 2, "eos_token_id": 0}
    out = beam_search(step, ONE, **words, max_length=3)
    assert out.lengths.tolist() == [[3, 3]] and out.tokens[0, 0].tolist() == [1, 1, 1]
    assert beam_search(step, ONE, **words, max_length=1).tokens.tolist() == [[[1], [2]]]


def test_no_prompts():
    out = beam_search(
        *(fixed(torch.zeros(3)), torch.zeros(0, 2, dtype=torch.int64)),
        num_beams=2,
        max_length=3,
        eos_token_id=0,
    )
    assert out.tokens.shape == (0, 1, 0) and out.scores.shape == (0, 1)


def test_temperature():
    logits = torch.randn(5)
    words = {"num_beams": 3, "num_return_sequences": 3, "max_length": 3, "eos_token_id": 0}
    hot = beam_search(fixed(logits), ONE, **words, temperature=2.0)
    same = beam_search(fixed(logits / 2), ONE, **words)
    assert torch.equal(hot.tokens, same.tokens)
    assert torch.allclose(hot.scores, same.scores, atol=1e-5)


GOOD = {"num_beams": 2, "max_length": 3, "eos_token_id": 0}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1, got 0"),
        ({"num_beams": 2.0}, TypeError, "num_beams must be an integer, got 2.0"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"min_length": -1}, ValueError, "min_length must be at least 0, got -1"),
        ({"num_return_sequences": 3}, ValueError, "from 1 to num_beams=2, got 3"),
        ({"num_groups": 3}, ValueError, "num_groups must divide num_beams=2, got 3"),
        ({"early_stopping": "always"}, ValueError, "True, False or 'never', got 'always'"),
        ({"length_penalty": math.nan}, ValueError, "length_penalty must be a finite number"),
        ({"length_penalty": 1e4}, ValueError, "the power of the length overflows"),
        ({"diversity_penalty": -1.0}, ValueError, "diversity_penalty must be at least 0"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id must be of token ids, 0 or more, got -1"),
        ({"eos_token_id": [1.5]}, ValueError, "eos_token_id must be of token ids"),
        ({"backend": "magic"}, ValueError, "magic"),
    ],
)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error, match=words):
        beam_search(fixed(torch.zeros(3)), ONE, **{**GOOD, **changes})


@pytest.mark.parametrize(
    ("step", "error", "words"),
    [
        (lambda tokens, cache: torch.zeros(1, 1, 3), ValueError, r"logits \[1, V\]"),
        (lambda tokens, cache: torch.zeros(2, 3), ValueError, "take those of the last position"),
        (lambda tokens, cache: [0.0], TypeError, "the logits that step returns must be a torch"),
        (lambda tokens, cache: torch.zeros(1, 3).int(), TypeError, "float32"),
    ],
)
def test_a_step_that_returns_something_else(step, error, words):
    with pytest.raises(error, match=words):
        beam_search(step, ONE, **GOOD)


@pytest.mark.parametrize("start", (torch.tensor([1]), torch.tensor([[1.0]]), [[1]]), ids=str)
def test_a_start_of_another_kind(start):
    with pytest.raises((TypeError, ValueError), match="start must be"):
        beam_search(fixed(torch.zeros(3)), start, **GOOD)
