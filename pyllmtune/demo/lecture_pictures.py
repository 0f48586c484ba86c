"""The pictures of ``docs/lecture.md``, computed by the ops they show.

python -m pyllmtune.demo.lecture_pictures [FOLDER]    # default: docs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllmtune import filter_logits, ppo_clip_loss, temperature_softmax
from pyllmtune.demo.picture import BLUE, GREY, INK, ORANGE

LOGITS = torch.tensor([3.0, 2.2, 1.6, 1.0, 0.5, 0.0, -0.5, -1.0])
NUCLEUS = torch.tensor([0.36, 0.25, 0.15, 0.09, 0.06, 0.05, 0.04])  # the first five: 0.91
EPS = 0.2


def draw(folder: Path) -> list[Path]:
    """Write the pictures; returns their paths. Needs matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _figure(folder / f"lecture_{name}.png", panels, drawer)
        for name, panels, drawer in (
            ("temperature", 3, temperature),
            ("nucleus", 1, nucleus),
            ("clip", 2, clip),
        )
    ]


def temperature(panels: list[Any]) -> None:
    """The same logits at three temperatures."""
    for panel, value in zip(panels, (0.5, 1.0, 2.0), strict=True):
        probabilities = temperature_softmax(LOGITS, value)
        panel.bar(range(len(LOGITS)), probabilities.tolist(), color=BLUE)
        _title(panel, f"T = {value:g}: the best has {probabilities[0]:.0%}")
        panel.set_ylim(0, 1)
        panel.set_xlabel("token", fontsize=9)
    panels[0].set_ylabel("probability", fontsize=9)


def nucleus(panels: list[Any]) -> None:
    """Tokens in order of probability: those before the mass reaches p = 0.9, and the crossing."""
    (panel,) = panels
    kept = filter_logits(NUCLEUS.log(), top_p=0.9).isfinite().tolist()
    colors = [BLUE if keep else "#d5d5d5" for keep in kept]
    panel.bar(range(len(kept)), NUCLEUS.tolist(), color=colors)
    total = NUCLEUS.cumsum(0).tolist()
    panel.step(range(len(total)), total, where="mid", color=INK, linewidth=1.3)
    panel.axhline(0.9, color=ORANGE, linewidth=1.3, linestyle=(0, (4, 2)))
    panel.text(-0.45, 0.92, "p = 0.9", color=ORANGE, fontsize=9)
    panel.text(3.4, 0.72, "mass so far", color=INK, fontsize=9)
    count = sum(kept)
    _title(panel, f"Nucleus: the first {count} tokens hold {total[count - 1]:.2f} and are kept")
    panel.set_ylim(0, 1.05)
    panel.set_xlabel("tokens, most probable first", fontsize=9)
    panel.set_ylabel("probability", fontsize=9)


def objective(ratio: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective of one token per ratio, and its derivative in the ratio."""
    logprobs = ratio.log()[:, None].requires_grad_()
    out = [
        ppo_clip_loss(row[None], torch.zeros(1, 1), torch.tensor([advantage]), eps=EPS).loss
        for row in logprobs
    ]
    loss = torch.stack(out)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return -loss.detach(), -gradient[:, 0] / ratio


def clip(panels: list[Any]) -> None:
    """The objective over the ratio, for a good and for a bad action; grey where nothing pulls."""
    ratio = torch.linspace(0.4, 1.7, 261)
    for panel, advantage in zip(panels, (1.0, -1.0), strict=True):
        value, slope = objective(ratio, advantage)
        panel.plot(
            ratio.tolist(),
            (ratio * advantage).tolist(),
            color=GREY,
            linewidth=1.0,
            linestyle=(0, (4, 2)),
        )
        for live, color in ((slope != 0, BLUE), (slope == 0, ORANGE)):
            shown = torch.where(live, value, torch.nan)
            panel.plot(ratio.tolist(), shown.tolist(), color=color, linewidth=2.6)
        for bound in (1 - EPS, 1 + EPS):
            panel.axvline(bound, color="#e6e6e6", linewidth=0.8, zorder=0)
        _title(panel, f"A = {advantage:+g}: blue pulls, orange has gradient 0")
        panel.set_xlabel("ratio new / old", fontsize=9)
    panels[0].set_ylabel("min(r A, clip(r) A)", fontsize=9)


def _figure(path: Path, panels: int, drawer: Any) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 * max(panels, 2), 3.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    drawer(list(axes))
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK, labelsize=8)
    figure.savefig(path)
    return path


def _title(panel: Any, text: str) -> None:
    panel.set_title(text, fontsize=10, loc="left", color=INK)


if __name__ == "__main__":
    for written in draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs")):
        print(written)
