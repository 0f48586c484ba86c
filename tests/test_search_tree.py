"""The lecture's beam search: greedy loses, three beams win; the tree of it and its picture."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from pyllmtune import SearchTree, plot_search_tree
from pyllmtune.decoding.hypotheses import Fate
from tests.helpers import use

BACKENDS = ("reference", "cpp")


def lecture() -> dict:
    """The case of the documentation's picture."""
    path = Path(__file__).resolve().parent.parent / "examples" / "beam_search.py"
    return runpy.run_path(str(path))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lecture_three_beams_win_where_greedy_loses(backend, monkeypatch):
    use(backend)
    monkeypatch.setenv("PYLLMTUNE_BACKEND", backend)
    case = lecture()
    words, probability = case["greedy"]()
    assert case["sentence"](words) == "we often try again ."
    assert probability == pytest.approx(0.5 * 0.4 * 0.6, abs=1e-6)
    out = case["search"](beams=3)
    found = [out.tokens[0, rank, : out.lengths[0, rank]].tolist() for rank in range(3)]
    assert [case["sentence"](one) for one in found] == [
        "we can tune models .",
        "we often tune models .",
        "we often try again .",
    ]
    want = torch.tensor([[0.4 * 0.9 * 0.8, 0.5 * 0.35 * 0.8, 0.5 * 0.4 * 0.6]])
    assert torch.allclose(out.scores.exp(), want, atol=1e-5)
    narrow = case["search"](beams=1)
    assert float(narrow.scores.exp()) == pytest.approx(probability, abs=1e-6)


def test_search_tree_holds_every_candidate():
    case = lecture()
    out = case["search"](beams=3)
    (tree,) = out.trees
    label = case["WORDS"].__getitem__
    first = [branch for branch in tree.branches if branch.depth == 1]
    assert [label(branch.token) for branch in first] == ["often", "can", "will"]
    second = [(label(b.token), b.fate) for b in tree.branches if b.depth == 2]
    assert second == [
        *(("tune", Fate.RUNNING), ("try", Fate.RUNNING), ("tune", Fate.RUNNING)),
        *(("stop", Fate.PRUNED), ("stop", Fate.PRUNED), ("stop", Fate.PRUNED)),
    ]
    best = [label(tree.branches[index].token) for index in tree.path(tree.best)]
    assert best == ["can", "tune", "models", "."]
    for branch in tree.branches:
        above = 0.0 if branch.parent is None else tree.branches[branch.parent].sum
        assert branch.sum <= above + 1e-6


def test_plot_search_tree():
    """Every candidate is written, pruned ones dotted, the best path in bold."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    case = lecture()
    (tree,) = case["search"](beams=3).trees
    axes = plot_search_tree(tree, label=case["WORDS"].__getitem__, prompt="we")
    texts = [text for text in axes.texts if text.get_text() != "we"]
    assert len(texts) == len(tree.branches)
    bold = [text.get_text().split()[0] for text in texts if text.get_fontweight() == "bold"]
    assert sorted(bold) == sorted(["can", "tune", "models", "."])
    dotted = sum(line.get_linestyle() == ":" for line in axes.lines if len(line.get_xdata()))
    assert dotted == sum(branch.fate == Fate.PRUNED for branch in tree.branches)
    assert plot_search_tree(SearchTree()).texts[0].get_text() == "prompt"  # nothing looked at
    matplotlib.pyplot.close("all")
