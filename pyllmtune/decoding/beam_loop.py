"""The loop of a beam search: score, choose, continue; what runs the model is the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyllmtune._backend import Backend
from pyllmtune.decoding.hypotheses import EarlyStopping, Hypothesis, new_pool
from pyllmtune.decoding.sample_beams import sample_beams
from pyllmtune.decoding.search_tree import Recorder, SearchTree
from pyllmtune.ops.beam_step import beam_step

# rows and tokens that continue them, [N] each -> the logits of what comes next, [N, V]
Forward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What ``beam_search`` was asked for; its docstring says what each is."""

    num_beams: int
    max_length: int
    eos: tuple[int, ...] = ()
    min_length: int = 0
    length_penalty: float = 0.0
    early_stopping: EarlyStopping = False
    num_groups: int = 1
    diversity_penalty: float = 0.0
    temperature: float = 1.0
    do_sample: bool = False
    seeds: Tensor | None = None  # [items] int64, with do_sample
    backend: Backend = "auto"

    def check(self) -> None:
        """Raise ValueError or TypeError at the first value that makes no sense."""
        for name in ("num_beams", "max_length", "num_groups"):
            _at_least(name, getattr(self, name), 1)
        _at_least("min_length", self.min_length, 0)
        if self.num_beams % self.num_groups:
            raise ValueError(
                f"num_groups must divide num_beams={self.num_beams}, got {self.num_groups}"
            )
        if not (self.early_stopping in (True, False) or self.early_stopping == "never"):
            raise ValueError(
                f"early_stopping must be True, False or 'never', got {self.early_stopping!r}"
            )
        for name in ("length_penalty", "diversity_penalty"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if abs(self.length_penalty) * math.log(self.max_length) > 600:  # e^600 is a double yet
            raise ValueError(
                f"length_penalty={self.length_penalty} is too large for max_length="
                f"{self.max_length}: the power of the length overflows; it is usually 0 to 2"
            )
        if self.do_sample and self.num_groups > 1:
            raise ValueError("do_sample draws from one group; leave out num_groups or do_sample")
        if self.diversity_penalty < 0:
            raise ValueError(f"diversity_penalty must be at least 0, got {self.diversity_penalty}")


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


class BeamLoop:
    """A search over ``items`` prompts.

    Args:
        items: prompts.
        settings: of the search.
        forward: runs the model.
        ends: which of the rows, followed by these tokens, are over; in place of the EOS set.
        normalised: ``forward`` returns log-probs, to be added as they are even if their
            exponentials do not sum to 1.
        trees: record what is looked at.
    """

    def __init__(
        self,
        items: int,
        settings: Settings,
        forward: Forward,
        *,
        ends: Callable[[Tensor, Tensor], Tensor] | None = None,
        normalised: bool = False,
        trees: bool = False,
    ) -> None:
        self._items, self._settings = items, settings
        self._forward, self._ends, self._normalised = forward, ends, normalised
        # a group of an item is a search of its own
        self._groups = items * settings.num_groups
        self._width = settings.num_beams // settings.num_groups
        self._pool = new_pool(
            self._groups,
            self._width,
            float(settings.length_penalty),
            settings.early_stopping,
            settings.min_length,
            settings.max_length,
        )
        self._recorder = Recorder(self._groups) if trees else None
        self._steps = 0

    def run(self, logits: Tensor) -> None:
        """From the logits after the prompts to the end; ``[items * num_beams, V]``, of which the
        first of each group is searched from, the others being copies of it.
        """
        sums = torch.full((self._groups, self._width), -math.inf, device=logits.device)
        sums[:, 0] = 0.0
        while not self._pool.done():
            rows, tokens, sums = self._step(logits, sums)
            if not self._pool.done():
                logits = self._forward(rows, tokens)

    def finished(self, item: int) -> list[Hypothesis]:
        """The hypotheses of all groups of an item, best first, ``parents`` counted in the item."""
        found = []
        for group in range(self._settings.num_groups):
            first = group * self._width
            for one in self._pool.finished(item * self._settings.num_groups + group):
                parents = [0, *(first + parent for parent in one.parents[1:])]
                found.append(Hypothesis(one.score, one.tokens, parents, one.sums))
        return sorted(found, key=lambda one: -one.score)  # stable: of equals the first group

    def trees(self) -> list[SearchTree] | None:
        """One a group of an item: those of the first item, then those of the second."""
        if self._recorder is None:
            return None
        for group in range(self._groups):
            for best in self._pool.finished(group)[:1]:
                self._recorder.mark_best(group, best)
        return self._recorder.trees

    def _step(self, logits: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step: rows, ``[items * num_beams]``, tokens that continue them, and their sums."""
        s = self._settings
        if self._normalised:
            sums = sums + logits.logsumexp(-1).view_as(sums)  # beam_step will subtract it
        if s.do_sample:
            choose = partial(sample_beams, seed=s.seeds, position=self._steps)
        else:
            groups = {"num_groups": s.num_groups, "diversity_penalty": s.diversity_penalty}
            choose = partial(beam_step, **groups)
        self._steps += 1
        found = choose(
            logits,
            sums.view(self._items, -1),
            num_beams=s.num_beams,
            eos_token_id=s.eos or None,
            temperature=s.temperature,
            # of these at most one a beam and ending token ends: enough are left to run on
            num_candidates=max(2, 1 + len(s.eos)) * s.num_beams,
            backend=s.backend,
        )
        scores, tokens, parents, ends = (x.view(self._groups, -1) for x in found[:4])
        first = torch.arange(self._groups, device=logits.device)[:, None] * self._width
        parents = parents - first % s.num_beams  # within the group
        if self._ends is not None:
            rows = (first + parents).clamp(min=0).flatten()  # an empty slot has parent 0, token -1
            ends = self._ends(rows, tokens.clamp(min=0).flatten()).view_as(ends)
        if s.do_sample and self._steps < s.max_length:
            scores, order = _finished_then_best(scores, ends, self._width)
            tokens, parents, ends = (x.gather(-1, order) for x in (tokens, parents, ends))
        lists = [x.tolist() for x in (scores, tokens, parents)]
        step = self._pool.advance(*lists, ends.tolist())
        if self._recorder is not None:
            self._recorder.record(*lists, step)
        return (
            (
                first + torch.tensor(step.parents, device=first.device).view(first.shape[0], -1)
            ).flatten(),
            torch.tensor(step.tokens, device=first.device),
            torch.tensor(step.sums, device=first.device, dtype=torch.float32).view_as(sums),
        )


def _finished_then_best(scores: Tensor, ends: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Drawn candidates as Transformers takes them: what ends must be among the first ``width``
    drawn; of the others the best run on. Their scores and order.
    """
    early = torch.arange(scores.shape[-1], device=scores.device) < width
    scores = torch.where(ends & ~early, -math.inf, scores)
    key = torch.where(ends & early, math.inf, scores)
    order = key.argsort(dim=-1, descending=True, stable=True)
    return scores.gather(-1, order), order
