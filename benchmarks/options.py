"""The command line of ``python -m benchmarks``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.cases import PROVIDERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Options:
    """What to measure, where and how long."""

    ops: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    rows: int
    vocab: int
    length: int
    threads: tuple[int, ...]
    warmup: float  # seconds a provider
    seconds: float  # a case; or
    repeat: int | None  # rounds
    providers: tuple[str, ...]
    cases: str
    output: Path | None
    quick: bool
    seed: int


def parse(argv: list[str] | None, ops: tuple[str, ...]) -> Options:
    parser = _parser(ops)
    words = parser.parse_args(argv)
    quick = words.quick
    if words.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was asked for, but torch sees no CUDA device here")
    if "trl" in (words.providers or ()) and find_spec("trl") is None:
        parser.error("--providers trl was asked for, but it is not installed: pip install trl")
    for name in ("rows", "vocab", "length", "repeat"):
        if (value := getattr(words, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if min(words.threads or [1]) < 1:
        parser.error(f"--threads must be at least 1, got {min(words.threads)}")
    if words.seconds <= 0:
        parser.error(f"--seconds must be positive, got {words.seconds}")

    providers = tuple(words.providers or PROVIDERS)
    if words.providers is None:
        left_out = {"trl"} if find_spec("trl") is None else set()
        if quick:  # compiling takes longer than everything else
            left_out.add("torch.compile")
        providers = tuple(name for name in PROVIDERS if name not in left_out)
    cores = torch.get_num_threads()
    save = words.save if words.save is not None else not quick
    return Options(
        ops=ops if words.op == "all" else (words.op,),
        device=torch.device(words.device),
        dtype=DTYPES[words.dtype],
        rows=words.rows or (4 if quick else 64),
        vocab=words.vocab or (2048 if quick else 151936),
        length=words.length or (128 if quick else 4096),
        threads=tuple(sorted(set(words.threads or (1, min(2, cores), cores)))),
        warmup=0.0 if quick else 0.3,
        seconds=words.seconds,
        repeat=words.repeat or (3 if quick else None),
        providers=providers,
        cases=words.cases,
        output=words.output if save else None,
        quick=quick,
        seed=words.seed,
    )


def _parser(ops: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time an op beside what people run today, after comparing its results with "
        "float64. Exit status 1 if ours are wrong. Charts: python -m benchmarks.plot",
    )
    add = parser.add_argument
    add("op", choices=(*ops, "all"))
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of the logits")
    add("--rows", type=int, metavar="N", help="rows of logits, or answers [64]")
    add("--vocab", type=int, metavar="V", help="of token_logprobs [151936]")
    add("--length", type=int, metavar="T", help="tokens of an answer, for policy_loss [4096]")
    add("--threads", type=int, nargs="+", metavar="T", help="each in turn [1, 2 and all cores]")
    duration = parser.add_mutually_exclusive_group()
    duration.add_argument("--repeat", type=int, metavar="R", help="rounds a case")
    duration.add_argument("--seconds", type=float, default=4.0, help="a case [4], 5 rounds or more")
    add("--providers", nargs="+", choices=PROVIDERS, help="[all that are installed]")
    add("--cases", default="", metavar="WORDS", help="only cases whose name contains this")
    save = "append to the CSV of today [yes; --quick: no]"
    add("--save", action=argparse.BooleanOptionalAction, help=save)
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="[benchmarks/results]")
    add("--quick", action="store_true", help="small shapes, few rounds: to see that all runs")
    add("--seed", type=int, default=0)
    return parser
