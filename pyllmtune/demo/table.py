"""The closing table: one loss step at a real vocabulary, each library in its own process.

Values come first: a library whose loss or gradient differs gets no time. Times are taken in turns,
one step of each library per round, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROWS, VOCAB = 64, 151_936  # Qwen's vocabulary
TOLERANCE = 1e-5  # relative, float32
LABELS = {"pyllmtune": "pyllmtune", "eager": "eager PyTorch", "compile": "torch.compile"}


class Size(NamedTuple):
    """Logits ``[rows, vocab]``, and for how long to measure."""

    rows: int = ROWS
    vocab: int = VOCAB
    seconds: float = 15.0
    rounds: int = 25


@dataclass
class Result:
    """One line of the table; ``refused`` says why there is no time."""

    provider: str
    refused: str | None = None
    gradient_difference: float | None = None
    peak_bytes: int | None = None
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.times)


class _Process:
    """A worker and its two pipes."""

    def __init__(self, provider: str, size: Size, threads: int) -> None:
        self.provider = provider
        arguments = [provider, *map(str, (size.rows, size.vocab, threads))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyllmtune.demo.loss_step", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a failed start comes back as its first line
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"ended with status {self.process.wait()}"}

    def ask(self, *words: str) -> dict[str, Any]:
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def measure(providers: Sequence[str], size: Size, threads: int) -> list[Result]:
    """One result per provider, in order; values are compared with ``"eager"``, one of them."""
    processes = []
    try:
        processes = [_Process(provider, size, threads) for provider in providers]
        results = [
            Result(process.provider, refused=process.answer().get("error")) for process in processes
        ]
        with tempfile.TemporaryDirectory() as folder:
            _compare(processes, results, Path(folder))
        running = [pair for pair in zip(processes, results, strict=True) if pair[1].refused is None]
        for process, result in running:
            result.peak_bytes = process.ask("memory")["bytes"]
        deadline = time.monotonic() + size.seconds
        for round_ in range(size.rounds):
            if round_ >= 3 and time.monotonic() > deadline:
                break
            for process, result in running:
                result.times.append(process.ask("time")["seconds"])
        return results
    finally:
        for process in processes:
            process.close()


def _compare(processes: list[_Process], results: list[Result], folder: Path) -> None:
    """Refuse whoever's loss, metrics or gradient is not eager PyTorch's."""
    values, gradients = {}, {}
    for process, result in zip(processes, results, strict=True):
        if result.refused is None:
            path = folder / f"{process.provider}.pt"
            values[process.provider] = process.ask("values", str(path))
            gradients[process.provider] = torch.load(path)
            path.unlink()
    expected, truth = values["eager"], gradients["eager"]
    for result in results:
        if result.refused is not None:
            continue
        own = values[result.provider]
        result.gradient_difference = (
            (gradients[result.provider] - truth).norm() / truth.norm()
        ).item()
        off = [
            name
            for name in expected
            if abs(own[name] - expected[name]) > TOLERANCE * max(1.0, abs(expected[name]))
        ]
        if off or not result.gradient_difference <= TOLERANCE:
            differs = [*off, f"gradient by {result.gradient_difference:.1e}"]
            result.refused = f"values differ: {', '.join(differs)}"


def lines(results: list[Result], size: Size) -> list[str]:
    """The table as text."""
    logits_bytes = 4 * size.rows * size.vocab
    base = next(result for result in results if result.provider == "eager")
    heads = f"{'median':>9}  {'speed-up':>8}  {'peak memory':>22}  {'gradient differs by':>19}"
    shown = [f"{'':14}  {heads}"]
    for result in results:
        label = LABELS[result.provider]
        if result.refused is not None:
            shown.append(f"{label:14}  no time: {result.refused}")
            continue
        peak = result.peak_bytes
        memory = "not measured"
        if peak is not None:
            memory = f"{peak / 1e6:.0f} MB ({peak / logits_bytes:.1f} x logits)"
        speed = f"{base.median / result.median:.2f} x" if base.times else ""
        shown.append(
            f"{label:14}  {result.median * 1e3:6.1f} ms  {speed:>8}  {memory:>22}"
            f"  {result.gradient_difference:>19.1e}"
        )
    return shown
