"""The demo from first line to last: supervise, tune twice, compare, measure, write."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from pyllmtune.demo import files, picture, report, table
from pyllmtune.demo.evaluate import Accuracy
from pyllmtune.demo.model import ModelConfig, Transformer
from pyllmtune.demo.progress import Progress
from pyllmtune.demo.settings import Settings, parse
from pyllmtune.demo.supervised import supervise
from pyllmtune.demo.task import Split, make_split
from pyllmtune.demo.train import train

T = TypeVar("T")


def run(argv: list[str] | None) -> int:
    """Run the demo with the threads asked for; 0 if everything that was compared agrees."""
    settings = parse(argv)
    threads = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        return _run(settings)
    finally:
        torch.set_num_threads(threads)


def _run(settings: Settings) -> int:
    seconds: dict[str, float] = {}

    def timed(phase: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        seconds[phase] = time.perf_counter() - began
        return result

    config = ModelConfig(dtype=getattr(torch, settings.dtype))
    about = report.machine()
    parameters = sum(weight.numel() for weight in Transformer(config).parameters())
    _print("", report.introduction(about, parameters, settings.seed))

    split = make_split(settings.validation, settings.held_out)
    start = timed("supervision", lambda: _supervise(config, split, settings))
    runs, comparison = timed(settings.title, lambda: train(start, split, settings))
    _print("Accuracy", report.accuracies(runs, len(split.held_out), settings.title))
    print("for example")
    _print("", report.examples(start, runs[0].policy, split.held_out[:3]))
    if comparison is not None:
        _print("Do the two runs coincide?", report.agreement(comparison, settings.steps))

    results: list[table.Result] = []
    if settings.table_providers:
        size, threads = settings.table, torch.get_num_threads()
        results = timed("table", lambda: table.measure(settings.table_providers, size, threads))
        title = f"One loss step, forward and backward, logits [{size.rows}, {size.vocab}] float32"
        _print(title, table.lines(results, size))

    settings.out.mkdir(parents=True, exist_ok=True)
    files.write_curves(settings.out / "curves.csv", runs)
    files.write_summary(
        settings.out / "summary.json", settings, about, seconds, runs, comparison, results
    )
    problem = picture.draw(
        settings.out / "curves.png", runs, _title(settings.title, runs[0].accuracies)
    )
    _print("Times", report.phases(seconds, runs))
    written = "curves.csv, summary.json" if problem else "curves.png, curves.csv, summary.json"
    print(f"written to {settings.out}: {written}" + (f"; {problem}" if problem else ""))
    agreed = comparison is None or comparison.lockstep.passed
    return 0 if agreed and all(result.refused is None for result in results[:1]) else 1


def _supervise(config: ModelConfig, split: Split, settings: Settings) -> Transformer:
    shown: dict[str, str] = {}
    with Progress("supervision", settings.stop.steps) as bar:

        def on_step(step: int, loss: float, measured: Accuracy | None) -> None:
            if measured is not None:
                shown.update(
                    zero_shot=f"{measured.zero_shot:.1%}", few_shot=f"{measured.few_shot:.1%}"
                )
            bar.advance(loss=f"{loss:.3f}", **shown)

        return supervise(config, split, settings.seed, settings.stop, on_step)


def _title(algorithm: str, accuracies: dict[int, Accuracy]) -> str:
    measured = list(accuracies.values())
    return (
        f"{algorithm} on two-digit arithmetic: zero-shot accuracy "
        f"{measured[0].zero_shot:.0%} to {measured[-1].zero_shot:.0%}, "
        f"few-shot {measured[0].few_shot:.0%} to {measured[-1].few_shot:.0%}"
    )


def _print(title: str, lines: list[str]) -> None:
    if title:
        print(f"\n{title}")
    print("\n".join(lines), flush=True)
