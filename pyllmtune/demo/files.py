"""What a run leaves behind: the curves as CSV, everything as JSON."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyllmtune.demo.evaluate import Accuracy
from pyllmtune.demo.loop import Record, Run
from pyllmtune.demo.settings import Settings
from pyllmtune.demo.table import Result
from pyllmtune.demo.train import Comparison


def write_curves(path: Path, runs: list[Run]) -> None:
    """One row per library and step; accuracies stand where they were measured."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["library", *Record._fields, *(f"held_out_{name}" for name in Accuracy._fields)]
        )
        for run in runs:
            measured = run.accuracies
            nothing = [""] * (len(Record._fields) - 1)
            writer.writerow([run.library.name, 0, *nothing, *measured[0]])
            for record in run.records:
                writer.writerow(
                    [
                        run.library.name,
                        *record,
                        *measured.get(record.step, [""] * len(Accuracy._fields)),
                    ]
                )


def write_summary(
    path: Path,
    settings: Settings,
    machine: dict[str, Any],
    seconds: dict[str, float],
    runs: list[Run],
    comparison: Comparison | None,
    table: list[Result],
) -> None:
    """Settings, machine, accuracies, agreement and times."""
    agreement = None
    if comparison is not None:
        agreement = {
            "updates_in_lockstep": comparison.lockstep.updates,
            "loss_difference": comparison.lockstep.loss_difference,
            "gradient_difference": comparison.lockstep.gradient_difference,
            "steps_with_equal_tokens": comparison.steps,
            "first_step_that_differs": comparison.first_difference,
            "largest_curve_differences": comparison.curves,
        }
    summary = {
        "settings": asdict(settings),
        "machine": machine,
        "seconds": seconds,
        "accuracy": {
            run.library.name: {
                str(step): measured._asdict() for step, measured in run.accuracies.items()
            }
            for run in runs
        },
        "agreement": agreement,
        "loss_step": [
            {**asdict(result), "median_seconds": result.median if result.times else None}
            for result in table
        ],
    }
    path.write_text(json.dumps(summary, indent=2, default=str) + "\n")
