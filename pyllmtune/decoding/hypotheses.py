"""The part of a beam search that is not tensors: running beams, their tree, finished hypotheses.

``BeamHypotheses`` here is the specification; ``csrc/host_beams.h`` is the same in C++, taken where
it was built.
"""

from __future__ import annotations

import heapq
import math
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

EarlyStopping = Literal[False, True, "never"]


class Fate(IntEnum):
    """What became of a candidate."""

    PRUNED = 0
    RUNNING = 1
    FINISHED = 2  # whether or not it found a place among the best


class Hypothesis(NamedTuple):
    """A finished sequence: ``sums[-1] / len(tokens) ** length_penalty`` is its score."""

    score: float
    tokens: list[int]  # first to last, the ending token included
    parents: list[int]  # the beam that each token was appended to
    sums: list[float]  # cumulative log-probs after each token


class Step(NamedTuple):
    """The beams that run on, ``[items * width]``; a dead one has parent 0, token 0, sum -inf."""

    parents: list[int]
    tokens: list[int]
    sums: list[float]
    fates: list[list[int]]  # [items, candidates], of Fate


class Pool(Protocol):
    """What ``BeamHypotheses`` and its C++ twin are to a search."""

    def advance(
        self,
        sums: list[list[float]],
        tokens: list[list[int]],
        parents: list[list[int]],
        ends: list[list[bool]],
    ) -> Step: ...

    def done(self) -> bool: ...

    def finished(self, item: int) -> list[Hypothesis]: ...


class _Node(NamedTuple):
    previous: _Node | None
    token: int
    parent: int
    sum: float


class _Item:
    def __init__(self) -> None:
        self.beams: list[_Node | None] = [None]  # the root; fewer than width if others are dead
        self.heap: list[tuple[float, int, _Node]] = []  # score, minus order of arrival; worst first
        self.done = False


class BeamHypotheses:
    """Running beams and finished hypotheses of ``items`` independent searches of one width.

    Each step takes the best candidates, best first, and decides:

    - a sum of -inf or NaN is no candidate, nor is one that ends before ``min_length``;
    - a candidate that ends (or has ``max_length`` tokens) is finished if it is among the first
      ``width``; the ``width`` best scores are kept, of equal ones those that came first;
    - of the others the first ``width`` run on.

    An item is done when no beam runs, or when ``width`` hypotheses are finished and, by
    ``early_stopping``: True, at once; False, the best running sum, over the present length to the
    power of the penalty, is no better than the worst of them; "never", the same, but over
    ``max_length`` where the penalty is positive, so that nothing better can be missed as long as
    log-probs are not positive. These are the rules of Transformers 5.
    """

    def __init__(
        self,
        items: int,
        width: int,
        length_penalty: float,
        early_stopping: EarlyStopping,
        min_length: int,
        max_length: int,
    ) -> None:
        self._width = width
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._min_length, self._max_length = min_length, max_length
        self._length = 0
        self._arrivals = 0
        self._items = [_Item() for _ in range(items)]

    def advance(
        self,
        sums: list[list[float]],
        tokens: list[list[int]],
        parents: list[list[int]],
        ends: list[list[bool]],
    ) -> Step:
        """One step of every item: ``[items, candidates]`` each, best first."""
        self._length += 1
        step = Step([], [], [], [])
        for item, *candidates in zip(self._items, sums, tokens, parents, ends, strict=True):
            step.fates.append(self._advance_item(item, *candidates))
            running = [] if item.done else item.beams
            dead = _Node(None, 0, 0, -math.inf)
            for node in [*running, *[dead] * (self._width - len(running))]:
                step.parents.append(node.parent)
                step.tokens.append(node.token)
                step.sums.append(node.sum)
        return step

    def done(self) -> bool:
        """Whether every item is done."""
        return all(item.done for item in self._items)

    def finished(self, item: int) -> list[Hypothesis]:
        """The finished hypotheses of an item, best first; at most ``width``."""
        best = sorted(self._items[item].heap, key=lambda one: one[:2], reverse=True)
        return [self._path(score, node) for score, _, node in best]

    def _advance_item(
        self,
        item: _Item,
        sums: list[float],
        tokens: list[int],
        parents: list[int],
        ends: list[bool],
    ) -> list[int]:
        fates = [int(Fate.PRUNED)] * len(sums)
        if item.done:
            return fates
        running: list[_Node | None] = []
        rank = 0
        for c, (total, token, parent, end) in enumerate(
            zip(sums, tokens, parents, ends, strict=True)
        ):
            if not total > -math.inf or (end and self._length < self._min_length):
                continue
            last = end or self._length == self._max_length
            wanted = rank < self._width if last else len(running) < self._width
            rank += 1
            if not wanted:
                continue
            node = _Node(item.beams[parent], token, parent, total)
            fates[c] = int(Fate.FINISHED if last else Fate.RUNNING)
            if last:
                self._add(item, node)
            else:
                running.append(node)
        item.beams = running
        item.done = self._is_done(item)
        return fates

    def _add(self, item: _Item, node: _Node) -> None:
        self._arrivals += 1
        one = (node.sum / self._weight(self._length), -self._arrivals, node)
        if len(item.heap) < self._width:
            heapq.heappush(item.heap, one)
        else:
            heapq.heappushpop(item.heap, one)

    def _is_done(self, item: _Item) -> bool:
        if not item.beams:
            return True
        if len(item.heap) < self._width:
            return False
        if self._early_stopping is True:
            return True
        longest = self._early_stopping == "never" and self._length_penalty > 0.0
        length = self._max_length if longest else self._length
        best = max(node.sum for node in item.beams)
        return not best / self._weight(length) > item.heap[0][0]

    def _weight(self, length: int) -> float:
        return float(length) ** self._length_penalty

    @staticmethod
    def _path(score: float, node: _Node | None) -> Hypothesis:
        nodes = []
        while node is not None:
            nodes.append(node)
            node = node.previous
        nodes.reverse()
        return Hypothesis(
            score,
            [node.token for node in nodes],
            [node.parent for node in nodes],
            [node.sum for node in nodes],
        )


def new_pool(
    items: int,
    width: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    min_length: int,
    max_length: int,
) -> Pool:
    """In C++ where the host module was built, else in Python."""
    settings = (items, width, length_penalty, early_stopping, min_length, max_length)
    try:
        from pyllmtune import _host
    except ImportError:
        return BeamHypotheses(*settings)
    stopping = _host.EarlyStopping.__members__[str(early_stopping).lower()]
    return _host.BeamHypotheses(*settings[:3], stopping, *settings[4:])
