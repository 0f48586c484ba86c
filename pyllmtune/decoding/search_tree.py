"""What a beam search looked at, and a picture of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyllmtune.decoding.hypotheses import Fate, Hypothesis, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {Fate.PRUNED: "0.7", Fate.RUNNING: "tab:blue", Fate.FINISHED: "tab:green"}


@dataclass(frozen=True)
class Branch:
    """A candidate of a step: ``token`` after the branch ``parent`` (None: after the prompt)."""

    parent: int | None
    depth: int  # tokens up to and including this one
    token: int
    sum: float  # cumulative log-prob
    fate: Fate


@dataclass
class SearchTree:
    """Every candidate that ``beam_step`` returned, in order; ``best`` is the last branch of the
    best hypothesis, None if nothing finished.
    """

    branches: list[Branch] = field(default_factory=list)
    best: int | None = None

    def path(self, branch: int | None) -> list[int]:
        """The branches from the prompt to ``branch``."""
        steps = []
        while branch is not None:
            steps.append(branch)
            branch = self.branches[branch].parent
        return steps[::-1]


class Recorder:
    """Grows one tree an item, step by step."""

    def __init__(self, items: int) -> None:
        self.trees = [SearchTree() for _ in range(items)]
        self._running: list[list[int | None]] = [[None] for _ in range(items)]

    def record(
        self,
        sums: list[list[float]],
        tokens: list[list[int]],
        parents: list[list[int]],
        step: Step,
    ) -> None:
        for item, candidates in enumerate(zip(sums, tokens, parents, step.fates, strict=True)):
            tree, before = self.trees[item], self._running[item]
            self._running[item] = []
            for total, token, parent, fate in zip(*candidates, strict=True):
                if not total > -math.inf or parent >= len(before):
                    continue
                above = before[parent]
                depth = 1 if above is None else tree.branches[above].depth + 1
                if fate == Fate.RUNNING:
                    self._running[item].append(len(tree.branches))
                tree.branches.append(Branch(above, depth, token, total, Fate(fate)))

    def mark_best(self, item: int, best: Hypothesis) -> None:
        tree, at = self.trees[item], None
        kept = {
            (branch.parent, branch.token): index
            for index, branch in enumerate(tree.branches)
            if branch.fate != Fate.PRUNED
        }
        for token in best.tokens:
            at = kept[at, token]
        tree.best = at


def plot_search_tree(
    tree: SearchTree,
    *,
    label: Callable[[int], str] = str,
    prompt: str = "prompt",
    axes: Axes | None = None,
) -> Axes:
    """Draw a search tree: tokens, cumulative log-probs, kept, finished and pruned branches.

    Args:
        tree: of ``beam_search(..., return_trees=True)``.
        label: the name of a token id, e.g. ``tokenizer.decode``.
        prompt: the name of the root.
        axes: drawn there; a new figure of matplotlib if not given.

    Returns:
        The axes; ``axes.figure.savefig(path)`` writes the picture.
    """
    heights = _heights(tree)
    if axes is None:
        from matplotlib import pyplot

        depth = max((branch.depth for branch in tree.branches), default=1)
        leaves = 1 + max(heights.values())
        _, axes = pyplot.subplots(figsize=(2.6 * depth + 1.5, 0.36 * leaves + 1), dpi=120)
    best = set(tree.path(tree.best))
    box = {"boxstyle": "round,pad=0.25", "fc": "white"}
    axes.text(0, heights[None], prompt, ha="center", va="center", bbox=box, fontsize=9)
    for index, branch in enumerate(tree.branches):
        ends = (heights[branch.parent], heights[index])
        colour = COLOURS[branch.fate]
        on_path = index in best
        dash = ":" if branch.fate == Fate.PRUNED else "-"
        axes.plot((branch.depth - 1, branch.depth), ends, dash, c=colour, lw=3 if on_path else 1.2)
        axes.text(
            branch.depth,
            ends[1],
            f"{label(branch.token)}  {branch.sum:.2f}",
            ha="center",
            va="center",
            fontsize=9,
            color="0.45" if branch.fate == Fate.PRUNED else "black",
            fontweight="bold" if on_path else "normal",
            bbox=box | {"ec": colour, "lw": 2 if on_path else 1},
        )
    for fate, colour in COLOURS.items():
        style = ":" if fate == Fate.PRUNED else "-"
        axes.plot([], [], style, c=colour, label=fate.name.lower())
    axes.plot([], [], c="black", lw=3, label="best")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False, fontsize=9)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_axis_off()
    return axes


def _heights(tree: SearchTree) -> dict[int | None, float]:
    """Leaves one below the other, a parent in the middle of its children."""
    children: dict[int | None, list[int]] = {None: []}
    for index, branch in enumerate(tree.branches):
        children.setdefault(index, [])
        children[branch.parent].append(index)
    heights: dict[int | None, float] = {}
    leaves = 0
    stack: list[tuple[int | None, bool]] = [(None, False)]
    while stack:
        node, visited = stack.pop()
        below = children[node]
        if not below:
            heights[node] = leaves
            leaves += 1
        elif visited:
            heights[node] = (heights[below[0]] + heights[below[-1]]) / 2
        else:
            stack += [(node, True), *((child, False) for child in reversed(below))]
    return heights
