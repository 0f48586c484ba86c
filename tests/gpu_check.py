"""``make gpu-check``, for whoever has an NVIDIA GPU: build, compare, sanitise, time; offline.

    python -m tests.gpu_check                    every step, in about ten minutes
    python -m tests.gpu_check --steps test time  some of them
    make gpu-check PYTHON=python3                with the Python, torch and Triton of an image

Each step is a process of its own; what it prints is kept in --log. Ends with one line a step, and
with status 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20")


def steps(words: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each step, in order."""
    check = [PYTHON, "-m", "pyllmtune", "check"]
    pip = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q", "-e", "."]
    bench = [PYTHON, "-m", "benchmarks", "all", "--device", "cuda", "--threads", "1"]
    return {
        "build": pip,
        "check": check,
        "test": [PYTHON, "-m", "pytest", "-q", "-n", str(words.processes), "tests"],
        "memcheck": [*SANITIZER, "--tool", "memcheck", *check],
        "racecheck": [*SANITIZER, "--tool", "racecheck", *check],
        "time": [*bench, "--rows", str(words.rows), "--seconds", str(words.seconds)],
    }


def environment() -> dict[str, str]:
    """Compiles for this GPU alone, and puts it behind the tests' GPU floors."""
    major, minor = torch.cuda.get_device_capability()
    fixed = {"FORCE_CUDA": "1", "PYLLMTUNE_BUILD": "1", "PYLLMTUNE_TEST_GPU": "1"}
    return {**fixed, "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", **os.environ}


def run(name: str, command: list[str], log: Path, limit: float) -> str:
    """Runs a step and returns its verdict."""
    if shutil.which(command[0]) is None:
        return f"skipped: {command[0]} is not on PATH"
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    with open(log / f"{name}.log", "w") as file:
        process = subprocess.Popen(
            command,
            cwd=REPO,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += f"\nstopped after {limit:.0f} s\n"
        file.write(output)
    print(output[-6000:], flush=True)
    return "ok" if process.returncode == 0 else f"FAILED with status {process.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [*steps(argparse.Namespace(processes=1, rows=1, seconds=1.0))]
    parser.add_argument("--steps", nargs="+", choices=names, default=names)
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--rows", type=int, default=512, help="of logits, for the timings")
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing, a case")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds, a step")
    parser.add_argument("--log", type=Path, default=REPO / "build" / "gpu_check")
    words = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; without one, `make test` checks the kernels")
    words.log.mkdir(parents=True, exist_ok=True)
    verdicts = {}
    for name, command in steps(words).items():
        if name in words.steps:
            begin = time.perf_counter()
            verdict = run(name, command, words.log, words.limit)
            verdicts[name] = f"{verdict}  ({time.perf_counter() - begin:.0f} s)"
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}; logs in {words.log}")
    for name, verdict in verdicts.items():
        print(f"{name:<11}{verdict}")
    return 1 if any("FAILED" in verdict for verdict in verdicts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
