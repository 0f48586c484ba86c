"""The C++ heap of hypotheses is its Python twin, and both follow the rules."""

from __future__ import annotations

import math
import random

import pytest

from pyllmtune.decoding.hypotheses import BeamHypotheses, Fate, new_pool
from tests import helpers

STOPPING = (False, True, "never")


def settings(**changes):
    names = ("items", "width", "length_penalty", "early_stopping", "min_length", "max_length")
    return {**dict(zip(names, (1, 2, 0.0, False, 0, 9), strict=True)), **changes}


def pools(**changes):
    """The Python pool and the C++ one."""
    helpers.need("cpp")
    from pyllmtune import _host

    fast = new_pool(**settings(**changes))
    assert isinstance(fast, _host.BeamHypotheses)
    return BeamHypotheses(**settings(**changes)), fast


def random_candidates(pick: random.Random, items: int, width: int, alive: list[int]):
    """Sums in descending order, with ties, empty slots and NaN among them."""
    count = 2 * width + pick.randrange(3)
    sums, tokens, parents, ends = [], [], [], []
    for item in range(items):
        values = sorted((-pick.randrange(40) / 4 for _ in range(count)), reverse=True)
        if pick.random() < 0.3:
            values[pick.randrange(count)] = math.nan
        empty = pick.choice((0, 0, 1, count - 1, count))
        sums.append(values[: count - empty] + [-math.inf] * empty)
        tokens.append([pick.randrange(50) for _ in range(count)])
        parents.append([pick.randrange(max(1, alive[item])) for _ in range(count)])
        ends.append([pick.random() < 0.4 for _ in range(count)])
    return sums, tokens, parents, ends


def same(a, b) -> bool:
    names = ("parents", "tokens", "sums")
    return all(list(getattr(a, name)) == list(getattr(b, name)) for name in names)


@pytest.mark.parametrize("early_stopping", STOPPING, ids=str)
def test_cpp_is_python(early_stopping):
    """Same choices, fates, ends and hypotheses, to the bit, over random searches."""
    pick = random.Random(str(early_stopping))
    finished = steps = 0
    for _ in range(150):
        items, width = pick.randrange(4), pick.randrange(1, 5)
        slow, fast = pools(
            items=items,
            width=width,
            length_penalty=pick.choice((-1.0, 0.0, 0.6, 1.0, 2.5)),
            early_stopping=early_stopping,
            min_length=pick.randrange(4),
            max_length=pick.randrange(1, 9),
        )
        alive = [1] * items
        while not slow.done():
            candidates = random_candidates(pick, items, width, alive)
            a, b = slow.advance(*candidates), fast.advance(*candidates)
            assert same(a, b) and a.fates == b.fates
            beams = [a.sums[i * width : (i + 1) * width] for i in range(items)]
            alive = [sum(value > -math.inf for value in beam) for beam in beams]
            assert fast.done() == slow.done()
            steps += 1
        for item in range(items):
            a, b = slow.finished(item), fast.finished(item)
            assert len(a) == len(b) <= width
            for one, other in zip(a, b, strict=True):
                assert same(one, other) and one.score == other.score
                finished += 1
    assert finished > 200 and steps > 250


def test_rules_of_a_step():
    """Beyond the first `width` nothing finishes; what ends does not run on."""
    for pool in pools(width=2):
        step = pool.advance(
            [[-1.0, -2.0, -3.0, -4.0]],
            [[9, 5, 9, 6]],
            [[0, 0, 0, 0]],
            [[True, False, True, False]],
        )
        want = [Fate.FINISHED, Fate.RUNNING, Fate.PRUNED, Fate.RUNNING]
        assert [Fate(fate) for fate in step.fates[0]] == want
        assert (step.tokens, step.sums) == ([5, 6], [-2.0, -4.0])
        (one,) = pool.finished(0)
        assert (one.score, one.tokens, one.parents, one.sums) == (-1.0, [9], [0], [-1.0])


def test_of_equal_scores_the_first_to_finish_stays():
    for pool in pools(width=1, early_stopping="never", length_penalty=1.0):
        pool.advance([[-1.0, -1.0]], [[9, 5]], [[0, 0]], [[True, False]])
        pool.advance([[-2.0, -3.0]], [[9, 5]], [[0, 0]], [[True, False]])  # -2 / 2 = -1
        (one,) = pool.finished(0)
        assert one.tokens == [9]


@pytest.mark.parametrize(
    ("early_stopping", "penalty", "sums", "done"),
    [
        (True, 0.0, -0.1, True),
        (False, 0.0, -0.5, False),  # -0.5 may still beat -1
        (False, 0.0, -1.0, True),  # an equal one comes too late
        (False, 1.0, -1.5, True),  # over the present length: -1.5
        ("never", 1.0, -1.5, False),  # over the largest: -1.5 / 4
        ("never", 0.0, -1.5, True),
        ("never", -1.0, -1.5, True),
    ],
)
def test_when_an_item_is_done(early_stopping, penalty, sums, done):
    for pool in pools(width=1, max_length=4, early_stopping=early_stopping, length_penalty=penalty):
        step = pool.advance([[-1.0, sums][:2]], [[9, 5]], [[0, 0]], [[True, False]])
        assert pool.done() == done
        assert step.sums == ([-math.inf] if done else [sums])


def test_minimum_and_maximum_length():
    for pool in pools(width=1, min_length=2, max_length=2):
        step = pool.advance([[-1.0, -2.0]], [[9, 5]], [[0, 0]], [[True, False]])
        assert step.tokens == [5] and not pool.finished(0)
        pool.advance([[-3.0, -4.0]], [[6, 9]], [[0, 0]], [[False, True]])
        assert pool.done() and pool.finished(0)[0].tokens == [5, 6]


def test_bad_words_of_the_cpp_pool():
    helpers.need("cpp")
    from pyllmtune import _host as host

    stopping = host.EarlyStopping.__members__["never"]
    with pytest.raises(ValueError, match="width and max_length at least 1"):
        host.BeamHypotheses(1, 0, 0.0, stopping, 0, 1)
    pool = host.BeamHypotheses(1, 2, 0.0, stopping, 0, 5)
    with pytest.raises(ValueError, match=r"must be \[items, candidates\]"):
        pool.advance([[-1.0]], [[1, 2]], [[0]], [[False]])
    with pytest.raises(ValueError, match="parents must be running beams, got 1"):
        pool.advance([[-1.0]], [[1]], [[1]], [[False]])
    with pytest.raises(IndexError):
        pool.finished(1)
