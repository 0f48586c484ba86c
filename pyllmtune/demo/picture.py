"""The picture: reward, held-out accuracy, KL and entropy of both runs, one on top of the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyllmtune.demo.loop import Run

BLUE, ORANGE, INK, GREY = "#2f6db5", "#d9822b", "#222222", "#8a8a8a"
# ours is a broad pale line, eager PyTorch a thin dashed one on top: both show where they coincide
BROAD = {"linewidth": 5.0, "alpha": 0.45, "solid_capstyle": "round"}
THIN = {"linewidth": 1.3, "linestyle": (0, (4, 2))}


def draw(path: Path, runs: list[Run], title: str) -> str | None:
    """Write the picture; returns the reason if it could not be drawn."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed (pip install matplotlib)"
    figure = Figure(figsize=(10.5, 7.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(title, fontsize=13, color=INK, x=0.015, ha="left", fontweight="bold")
    panels = figure.subplots(2, 2).flat
    first = "preferred" if runs[0].settings.objective.offline else "reward"
    for panel, name in zip(panels, (first, "accuracy", "kl", "entropy"), strict=True):
        _curve(panel, runs, name) if name != "accuracy" else _accuracy(panel, runs)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(GREY)
        panel.tick_params(colors=INK, labelsize=9)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.set_xlim(0, runs[0].records[-1].step)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("step", fontsize=9, color=INK)
    figure.savefig(path)
    return None


_TITLES = {
    "reward": "Mean reward of sampled answers",
    "preferred": "Share of pairs in which the policy prefers the better answer",
    "kl": "KL to the supervised model, nats per token",
    "entropy": "Entropy, nats per token",
}


def _style(index: int, color: str) -> dict[str, Any]:
    return {"color": color, **(BROAD if index == 0 else THIN)}


def _curve(panel: Any, runs: list[Run], name: str) -> None:
    panel.set_title(_TITLES[name], fontsize=10.5, loc="left", color=INK, pad=8)
    for index, run in enumerate(runs):
        steps = [record.step for record in run.records]
        values = [getattr(record, name) for record in run.records]
        panel.plot(
            steps, values, label=run.library.name, **_style(index, BLUE if index == 0 else INK)
        )
    panel.set_ylim(0, panel.get_ylim()[1])
    if name in ("reward", "preferred"):
        panel.legend(frameon=False, fontsize=9, loc="lower right", handlelength=3)


def _accuracy(panel: Any, runs: list[Run]) -> None:
    panel.set_title(
        "Held-out accuracy, greedy decoding, %", fontsize=10.5, loc="left", color=INK, pad=8
    )
    steps = list(runs[0].accuracies)
    for name, color in (("zero_shot", BLUE), ("few_shot", ORANGE)):
        for index, run in enumerate(runs):
            values = [100 * getattr(measured, name) for measured in run.accuracies.values()]
            panel.plot(steps, values, **_style(index, color if index == 0 else INK))
        first = [100 * getattr(measured, name) for measured in runs[0].accuracies.values()]
        panel.plot(steps, first, "o", color=color, markersize=4.5)
    for height, name, color in ((0.12, "few_shot", ORANGE), (0.04, "zero_shot", BLUE)):
        values = [getattr(measured, name) for measured in runs[0].accuracies.values()]
        label = f"{name.replace('_', '-')}  {values[0]:.0%} to {values[-1]:.0%}"
        panel.text(
            0.98, height, label, transform=panel.transAxes, ha="right", color=color, weight="bold"
        )
    panel.set_ylim(0, 105)
