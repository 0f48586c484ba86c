"""The command line of the demo."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from pyllmtune.demo import algorithms
from pyllmtune.demo.losses import objectives
from pyllmtune.demo.supervised import Stop
from pyllmtune.demo.table import Size

KL_COEF, ENTROPY_COEF = 0.02, 0.01

_DESCRIPTION = """\
Tune a small language model by GRPO, PPO, DPO or REINFORCE through pyllmtune, and again with the
same seeds through eager PyTorch.

A character-level transformer is made here and trained on sums and differences of two-digit numbers,
stopped while it is still often wrong. Right answers are then rewarded (1), and the keywords of
reasoning (0.1 in all). Held-out accuracy is measured by greedy decoding, zero-shot and few-shot. At
the end, one loss step at the vocabulary of a real model is timed. About three minutes on two cores;
nothing is downloaded."""


@dataclass(frozen=True)
class Settings:
    """One invocation of the demo."""

    steps: int
    questions: int
    group_size: int
    learning_rate: float | None
    algorithm: str
    loss: str
    kl_coef: float
    entropy_coef: float
    keyword_weight: float
    top_p: float
    seed: int
    dtype: str
    threads: int | None
    out: Path
    eager: bool
    quick: bool
    stop: Stop
    validation: int
    held_out: int
    measure_every: int
    lockstep: int
    table: Size
    table_providers: tuple[str, ...]

    @property
    def title(self) -> str:
        return self.algorithm.upper()


def _at_least(low: float, kind: type) -> object:
    def parse(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its own errors
    return parse


def parser() -> argparse.ArgumentParser:
    """Options and defaults."""
    parser = argparse.ArgumentParser(
        "python -m pyllmtune demo",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=_at_least(1, int), default=40, help="steps of tuning (default 40)")
    add("--questions", type=_at_least(1, int), default=64, help="questions per step (default 64)")
    add(
        "--group-size",
        type=_at_least(2, int),
        default=8,
        help="answers sampled per question (default 8)",
    )
    add(
        "--learning-rate",
        type=_at_least(0.0, float),
        help="of AdamW, at its peak (default 1e-3; dpo 1e-4)",
    )
    add("--algorithm", choices=algorithms.NAMES, default="grpo", help="(default grpo)")
    add("--loss", choices=objectives(0.0, 0.0), help="policy loss of --algorithm grpo (grpo)")
    add(
        "--kl-coef",
        type=_at_least(0.0, float),
        default=KL_COEF,
        help=f"KL to the start (default {KL_COEF})",
    )
    add(
        "--entropy-coef",
        type=_at_least(0.0, float),
        default=ENTROPY_COEF,
        help=f"bonus (default {ENTROPY_COEF})",
    )
    add(
        "--keyword-weight",
        type=_at_least(0.0, float),
        default=0.1,
        help="of the second reward (default 0.1)",
    )
    add(
        "--top-p",
        type=_at_least(0.0, float),
        default=0.99,
        help="sample from the nucleus and train on its distribution (default 0.99; 1: on all)",
    )
    add(
        "--seed",
        type=_at_least(0, int),
        default=0,
        help="of weights, data and sampling (default 0)",
    )
    add(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="of the model; in float64 the two runs stay together longer (default float32)",
    )
    add("--threads", type=_at_least(1, int), help="CPU threads (default: as torch chooses)")
    add(
        "--out",
        type=Path,
        default=Path("out/demo"),
        help="folder of picture and curves (default out/demo)",
    )
    add("--no-eager", action="store_true", help="only pyllmtune's run: no comparison, no table")
    add(
        "--quick",
        action="store_true",
        help="a few steps of everything, to see that it works; learns nothing",
    )
    return parser


def parse(argv: list[str] | None) -> Settings:
    """Settings of a command line; ``--quick`` shrinks every phase."""
    commands = parser()
    options = commands.parse_args(argv)
    if options.loss is not None and options.algorithm != "grpo":
        commands.error(f"--loss belongs to --algorithm grpo, got {options.algorithm}")
    quick = options.quick
    compared = ("pyllmtune", "eager") if quick else ("pyllmtune", "eager", "compile")
    return Settings(
        steps=min(options.steps, 3) if quick else options.steps,
        questions=min(options.questions, 4) if quick else options.questions,
        group_size=options.group_size,
        learning_rate=options.learning_rate,
        algorithm=options.algorithm,
        loss=options.loss or "grpo",
        kl_coef=options.kl_coef,
        entropy_coef=options.entropy_coef,
        keyword_weight=options.keyword_weight,
        top_p=options.top_p,
        seed=options.seed,
        dtype=options.dtype,
        threads=options.threads,
        out=options.out,
        eager=not options.no_eager,
        quick=quick,
        stop=Stop(steps=5) if quick else Stop(),
        validation=256,
        held_out=16 if quick else 512,
        measure_every=2 if quick else 5,
        lockstep=2 if quick else 3,
        table=Size(seconds=1.0, rounds=3) if quick else Size(),
        table_providers=() if options.no_eager else compared,
    )
