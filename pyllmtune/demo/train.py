"""The two runs side by side: the same questions and random numbers, one step of each in turn."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pyllmtune.demo.algorithms import algorithm
from pyllmtune.demo.evaluate import accuracy
from pyllmtune.demo.lockstep import Lockstep
from pyllmtune.demo.loop import Run, RunSettings
from pyllmtune.demo.model import Transformer
from pyllmtune.demo.progress import Progress
from pyllmtune.demo.settings import Settings
from pyllmtune.demo.task import Split


@dataclass
class Comparison:
    """How long two runs stay together; curves are compared while the sampled tokens are equal."""

    lockstep: Lockstep
    steps: int = 0  # with equal tokens, from the first
    first_difference: int | None = None  # the step at which a sampled token differs
    curves: dict[str, float] = field(
        default_factory=lambda: {"reward": 0.0, "loss": 0.0, "grad_norm": 0.0}
    )

    def note(self, step: int, first: Run, second: Run) -> None:
        """Compare the step that both runs have just made."""
        if self.first_difference is not None:
            return
        if not torch.equal(first.answers, second.answers):
            self.first_difference = step
            return
        self.steps = step
        for name, largest in self.curves.items():
            difference = abs(getattr(first.records[-1], name) - getattr(second.records[-1], name))
            self.curves[name] = max(largest, difference)


def train(
    start: Transformer, split: Split, settings: Settings
) -> tuple[list[Run], Comparison | None]:
    """Pyllmtune's run and, unless switched off, eager PyTorch's."""
    objective, libraries = algorithm(
        settings.algorithm, settings.loss, settings.kl_coef, settings.entropy_coef
    )
    shared = RunSettings(
        objective,
        settings.seed,
        settings.steps,
        settings.questions,
        settings.group_size,
        objective.learning_rate if settings.learning_rate is None else settings.learning_rate,
        settings.keyword_weight,
        settings.top_p,
    )
    compared = libraries if settings.eager else libraries[:1]
    runs = [Run(start, library, shared, split.train) for library in compared]
    comparison = Comparison(Lockstep(*libraries, objective)) if settings.eager else None
    for run in runs:
        run.accuracies[0] = accuracy(start, split.held_out, split.train)

    with Progress(settings.title, settings.steps) as bar:
        for step in range(1, settings.steps + 1):
            for run in runs:
                watch = (
                    comparison.lockstep
                    if comparison and run is runs[0] and step <= settings.lockstep
                    else None
                )
                record = run.step(step, watch)
                if step % settings.measure_every == 0 or step == settings.steps:
                    run.accuracies[step] = accuracy(run.policy, split.held_out, split.train)
            if comparison is not None:
                comparison.note(step, *runs)
            measured = list(runs[0].accuracies.values())[-1]
            bar.advance(
                reward=f"{record.reward:.2f}",
                zero_shot=f"{measured.zero_shot:.1%}",
                few_shot=f"{measured.few_shot:.1%}",
                **(
                    {}
                    if comparison is None
                    else {"same_tokens": "yes" if comparison.first_difference is None else "no"}
                ),
            )
    return runs, comparison
