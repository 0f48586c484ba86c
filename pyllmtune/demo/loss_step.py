"""One worker of the closing table: a process of its own, so that its peak memory is its own.

Runs ``logits -> log-probs, entropy -> policy loss`` and back at the size of a real vocabulary, when
a line of its input says so: ``values PATH`` (writes the gradient), ``time`` or ``memory``. Each is
answered with one JSON line.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllmtune.demo import eager, fused
from pyllmtune.demo.losses import Batch, Loss, objectives

ANSWERS = 4  # the rows are the tokens of this many answers
CONFIG = objectives(kl_coef=0.02, entropy_coef=0.01)["grpo"].config


def inputs(rows: int, vocab: int) -> tuple[Tensor, Batch]:
    """Float32 logits ``[ANSWERS, rows / ANSWERS, vocab]``; some ratios of the batch are clipped."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ANSWERS, rows // ANSWERS, vocab, generator=generator)
    shape = logits.shape[:2]
    tokens = torch.randint(vocab, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.bool)
    current = eager.score(logits, tokens, mask)
    old, ref = (current + 0.2 * torch.randn(shape, generator=generator) for _ in range(2))
    advantages = torch.randn(ANSWERS, generator=generator)
    return logits.requires_grad_(), Batch(tokens, mask, old, ref, advantages=advantages)


def step_of(provider: str) -> Any:
    """The function ``(logits, batch) -> Loss`` that this worker measures."""
    if provider == "pyllmtune":
        return lambda logits, batch: fused.loss(logits, batch, CONFIG, 1.0)
    if provider == "eager":
        return lambda logits, batch: eager.loss(logits, batch, CONFIG, 1.0)
    terms = torch.compile(eager.terms, fullgraph=True, dynamic=False)
    return lambda logits, batch: eager.named(*terms(logits, batch, CONFIG, 1.0))


def memory_of_process(field: str) -> int | None:
    """``VmRSS`` or ``VmHWM`` in bytes; None where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field)),
        None,
    )


def reset_high_water_mark() -> bool:
    """Set VmHWM back to the memory in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class Worker:
    """Holds the inputs; every command runs one forward and backward."""

    def __init__(self, provider: str, rows: int, vocab: int) -> None:
        self.step = step_of(provider)
        self.logits, self.batch = inputs(rows, vocab)
        for _ in range(2):  # compiles, and starts the threads
            self.run()

    def run(self) -> Loss:
        self.logits.grad = None
        loss = self.step(self.logits, self.batch)
        loss.value.backward()
        return loss

    def values(self, path: str) -> dict[str, Any]:
        loss = self.run()
        torch.save(self.logits.grad, path)
        return {"loss": loss.value.item(), **loss.metrics}

    def time(self) -> dict[str, Any]:
        began = time.perf_counter()
        self.run()
        return {"seconds": time.perf_counter() - began}

    def memory(self) -> dict[str, Any]:
        """What a step adds to the memory in use at most, with the gradient of the logits."""
        self.logits.grad = None
        gc.collect()
        if not reset_high_water_mark():
            return {"bytes": None}
        before = memory_of_process("VmRSS")
        self.run()
        peak = memory_of_process("VmHWM")
        return {"bytes": None if before is None or peak is None else peak - before}


def main(provider: str, rows: str, vocab: str, threads: str) -> None:
    """Serve until the input ends. A worker that cannot start says why in its first line."""
    torch.set_num_threads(int(threads))
    try:
        worker = Worker(provider, int(rows), int(vocab))
    except Exception as error:  # no C++ compiler for torch.compile, say: the table shows the reason
        print(
            json.dumps({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}),
            flush=True,
        )
        return
    print(json.dumps({"ready": provider}), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        print(json.dumps(getattr(worker, command)(*arguments)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
