"""What the demo prints: machine, accuracies, whether the runs coincide, times."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import pyllmtune
from pyllmtune import _backend, _load
from pyllmtune.demo.evaluate import Accuracy, answers
from pyllmtune.demo.lockstep import TOLERANCE
from pyllmtune.demo.loop import Run
from pyllmtune.demo.model import Transformer
from pyllmtune.demo.task import Question, zero_shot
from pyllmtune.demo.train import Comparison


def machine() -> dict[str, Any]:
    """What the numbers depend on, and which backend runs."""
    backend = _backend.resolve("auto", torch.device("cpu"), torch.float32)
    return {
        "backend": backend,
        "capability": _load.cpu_capability if backend == "cpp" else None,
        "pyllmtune": pyllmtune.__version__,
        "torch": torch.__version__,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The CPU's name, where the system tells."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def introduction(about: dict[str, Any], parameters: int, seed: int) -> list[str]:
    """The first lines; says so if no compiled kernels are there."""
    backend = f"cpp ({about['capability']})" if about["backend"] == "cpp" else about["backend"]
    first = [
        f"pyllmtune {about['pyllmtune']}, backend {backend}; torch {about['torch']}",
        f"{about['cpu']}, {about['threads']} threads; {parameters:,} parameters, seed {seed}",
    ]
    if about["backend"] == "reference":
        missing = _backend.why_not("cpp", "cpu")
        why = f"no compiled kernels ({missing})" if missing else "chosen by PYLLMTUNE_BACKEND"
        first.append(f"the reference runs, which is eager PyTorch too: {why}")
    return first


def accuracies(runs: list[Run], questions: int, title: str) -> list[str]:
    """Held-out accuracy before and after, zero-shot and few-shot apart."""

    def row(label: str, measured: Accuracy) -> str:
        return label.ljust(34) + "".join(f"{100 * share:11.1f} %" for share in measured)

    head = f"share of {questions} held-out questions".ljust(34)
    names = ("zero-shot", "few-shot", "steps shown", "steps right")
    shown = [head + "".join(f"{name:>13}" for name in names)]
    shown.append(row("after supervision", runs[0].accuracies[0]))
    for run in runs:
        shown.append(row(f"after {title}, {run.library.name}", list(run.accuracies.values())[-1]))
    return shown


def examples(before: Transformer, after: Transformer, questions: list[Question]) -> list[str]:
    """A few held-out questions, answered before and after."""
    prompts = [zero_shot(question) for question in questions]
    shown = []
    for question, old, new in zip(
        questions, answers(before, prompts), answers(after, prompts), strict=True
    ):
        shown += [
            f"  before  {question.text}{old.rstrip()}",
            f"  after   {question.text}{new.rstrip()}",
        ]
    return shown


def agreement(comparison: Comparison, steps: int) -> list[str]:
    """Whether the two runs coincide, in plain words."""
    lockstep = comparison.lockstep
    verdict = f"within {TOLERANCE:g}" if lockstep.passed else f"NOT within {TOLERANCE:g}"
    shown = [
        f"same weights and batch, {lockstep.updates} updates: loss differs by "
        f"{lockstep.loss_difference:.1e}, gradient by {lockstep.gradient_difference:.1e} "
        f"(relative), {verdict}"
    ]
    if comparison.first_difference is None:
        shown.append(f"each run on its own: the same tokens were sampled in all {steps} steps")
    else:
        shown.append(
            f"each run on its own: sampled tokens first differ at step "
            f"{comparison.first_difference} of {steps}; rounding has grown into another answer "
            "there, and from there the curves part"
        )
    if comparison.steps:
        largest = ", ".join(f"{name} {value:.1e}" for name, value in comparison.curves.items())
        shown.append(
            f"largest differences of the curves through step {comparison.steps}: {largest}"
        )
    return shown


def phases(seconds: dict[str, float], runs: list[Run]) -> list[str]:
    """Where the time went."""
    shown = [", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())]
    for run in runs:
        shown.append(
            f"{run.library.name}: sampling {run.sampling_seconds:.1f} s, "
            f"scores and updates {run.update_seconds:.1f} s"
        )
    return shown
