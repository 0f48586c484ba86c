"""Cases that need several processes: ``run`` starts the ranks of a gloo group once, each runs every
case of the modules, and what failed comes back by name.

A case is a function ``case(rank, world)`` in a module's ``CASES``, or in ``SLOW_CASES``, which two
ranks run and more do not; it fails by raising. A wrong
number (AssertionError) on one rank leaves the others in step if it does so on all, or if the case's
collectives came before; any other error ends its rank. A rank that waits for one that is gone, or
for ever, fails by gloo's time limit, and all by that of ``run``.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
COLLECTIVE = datetime.timedelta(seconds=60)


Case = Callable[[int, int], None]


def cases(modules: tuple[str, ...], world: int) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for module in map(importlib.import_module, modules):
        found |= module.CASES | (getattr(module, "SLOW_CASES", {}) if world == 2 else {})
    return found


def run(modules: tuple[str, ...], world: int, folder: Path, seconds: float = 240) -> dict[str, str]:
    """What went wrong in each case, by name; "" is nothing. A case that a rank did not finish is
    not there.
    """
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ranks, logs = [], [folder / f"{rank}.log" for rank in range(world)]
    for rank, log in enumerate(logs):
        place = [str(rank), str(world), str(folder)]
        command = [sys.executable, "-m", "tests.ranks", *place, *modules]
        with log.open("w") as output:
            options = {"cwd": ROOT, "env": os.environ | threads}
            ranks.append(
                subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
            )
    end = time.monotonic() + seconds
    try:
        for process in ranks:
            process.wait(max(end - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        pass  # the cases that are not in the reports
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    results: list[dict[str, str]] = []
    for rank in range(world):
        path = folder / f"{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        results.append(dict(json.loads(line) for line in lines))
    done = set.intersection(*(set(result) for result in results))
    report = {"log": "\n".join(f"rank {i}:\n{log.read_text()}" for i, log in enumerate(logs))}
    for name in [name for result in results for name in result]:
        errors = [
            f"rank {i}:\n{result[name]}" for i, result in enumerate(results) if result.get(name)
        ]
        if name in done or errors:
            report[name] = "\n".join(errors)
    return report


def main(rank: int, world: int, folder: Path, modules: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=COLLECTIVE
    )
    with (folder / f"{rank}.jsonl").open("w", buffering=1) as report:
        for name, case in cases(modules, world).items():
            torch.manual_seed(0)  # the same tensors on every rank
            error = ""
            try:
                case(rank, world)
            except Exception as reason:
                error = traceback.format_exc()
                if not isinstance(reason, AssertionError):
                    report.write(json.dumps([name, error]) + "\n")
                    raise
            report.write(json.dumps([name, error]) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), tuple(sys.argv[4:]))
