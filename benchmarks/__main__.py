"""``python -m benchmarks OP``: measure, print, save, judge."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch

from benchmarks import (
    bench_beam_search,
    bench_beam_step,
    bench_filter_logits,
    bench_gae,
    bench_kept_logits,
    bench_kept_token_logprobs,
    bench_kl_divergence,
    bench_linear_policy_loss,
    bench_linear_token_logprobs,
    bench_policy_loss,
    bench_sample,
    bench_temperature_softmax,
    bench_token_logprobs,
    machine,
    report,
    targets,
)
from benchmarks.cases import Case
from benchmarks.options import Options, parse
from benchmarks.protocol import measure

BENCHES = {
    bench.OP: bench
    for bench in (
        bench_temperature_softmax,
        bench_filter_logits,
        bench_sample,
        bench_beam_step,
        bench_beam_search,
        bench_token_logprobs,
        bench_kl_divergence,
        bench_kept_token_logprobs,
        bench_kept_logits,
        bench_linear_token_logprobs,
        bench_linear_policy_loss,
        bench_policy_loss,
        bench_gae,
    )
}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if a result of ours was wrong, 2 for bad words."""
    options = parse(argv, tuple(BENCHES))
    cases = [case for op in options.ops for case in BENCHES[op].cases(options)]
    chosen = [case for case in cases if options.cases in case.name and case.providers]
    if not chosen:
        names = ", ".join(dict.fromkeys(case.name for case in cases))
        asked = f"{options.cases!r} in its name and is computed by {', '.join(options.providers)}"
        print(f"no case has {asked}; there are: {names}", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    try:
        rows = _run(chosen, options)
    finally:
        torch.set_num_threads(threads)
    ours = [row for row in rows if row["provider"].startswith("pyllmtune")]
    return 0 if all(row["verdict"] == "ok" for row in ours) else 1


def _run(cases: list[Case], options: Options) -> list[report.Row]:
    where = machine.describe(options.device)
    bar, say = _progress()
    say(", ".join(f"{name} {value}" for name, value in where.items() if value))
    done: list[report.Row] = []
    path = None
    for case in bar(cases):
        for measurements in measure(case, options):
            rows = report.rows_of(case, measurements, where)
            say(report.table(case, measurements, rows))
            if options.output is not None:
                path = report.append(rows, options.output)
            done += rows
    if options.device.type == "cpu" and not options.quick:
        for op in options.ops:
            say(f"\n{op}: targets, set for {targets.SHAPES[op]}, {targets.THREADS} threads")
            say("\n".join(targets.judge(op, done)))
    if path is not None:
        say(f"\nsaved in {path}")
    return done


def _progress() -> tuple[Callable[[list[Case]], Iterable[Case]], Callable[[str], None]]:
    """A bar over the cases and a print that does not tear it, where tqdm is installed."""
    if find_spec("tqdm") is None:
        return iter, print
    from tqdm import tqdm

    return (lambda cases: tqdm(cases, unit="case", leave=False, disable=None)), tqdm.write


if __name__ == "__main__":
    sys.exit(main())
