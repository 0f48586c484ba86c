"""kl_divergence: cases, providers and the bytes that each must move.

S = rows * vocab * sizeof(dtype), the logits of one model
forward               read 2S
backward              read 2S, write S, or 2S where both models learn
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import kl_divergence

OP = "kl_divergence"
CHUNK = 8  # rows: bounds the memory of the float64 reference
DISTANCE = {"far": 3.0, "close": 0.05}  # of the two models' logits: a KL of 4, and of 1e-3

Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    logits: Tensor  # [rows, V]
    ref_logits: Tensor  # [rows, V]
    grad: Tensor  # [rows]  upstream gradient of the divergence


def draw(
    shape: tuple[int, int],
    dtype: torch.dtype,
    distance: float,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    logits, noise = (
        torch.empty(shape, dtype=dtype, device=device).normal_(0, deviation, generator=generator)
        for deviation in (3.0, distance)
    )
    grad = torch.empty(shape[0], device=device).normal_(generator=generator)
    return Inputs(logits, noise.add_(logits), grad)


def reference(js_weight: float | None, wanted: int, inputs: Inputs) -> Results:
    """The divergence, and ``wanted`` gradients, in float64."""
    parts = []
    for part in torch.arange(len(inputs.logits), device=inputs.logits.device).split(CHUNK):
        rows = [x[part].double() for x in (inputs.logits, inputs.ref_logits)]
        for x in rows[:wanted]:
            x.requires_grad_()
        out = kl_divergence(*rows, js_weight=js_weight, backend="reference")
        grads = (
            torch.autograd.grad(out, rows[:wanted], inputs.grad[part].double()) if wanted else ()
        )
        parts.append((out.detach(), *grads))
    names = ("divergence", "gradient", "ref_gradient")
    return dict(zip(names, map(torch.cat, zip(*parts, strict=True)), strict=False))


def eager(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """What a trainer writes. In float32: half-precision log-probs lose what the gate asks for."""
    log_p, log_q = (torch.log_softmax(x.float(), -1) for x in (logits, ref_logits))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def eager_mixture(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Jensen-Shannon as TRL's GKD trainer computes it, weight 1/2."""
    log_p, log_q = (torch.log_softmax(x.float(), -1) for x in (logits, ref_logits))
    half = torch.tensor(0.5, device=logits.device).log()
    log_m = torch.logsumexp(torch.stack([log_p + half, log_q + half]), 0)
    parts = (F.kl_div(log_m, x, reduction="none", log_target=True) for x in (log_p, log_q))
    return (sum(parts) / 2).sum(-1)


def table(options: Options, dtype: torch.dtype, js_weight: float | None) -> dict[str, Divergence]:
    """Every provider asked for, by name."""
    found: dict[str, Divergence] = {
        f"pyllmtune {backend}": partial(kl_divergence, js_weight=js_weight, backend=backend)
        for backend in our_backends(options.device, dtype)
    }
    natural = eager_mixture if js_weight else eager
    found["eager"] = natural
    if "torch.compile" in options.providers:
        found["torch.compile"] = torch.compile(natural, dynamic=False, fullgraph=True)
    return {name: run for name, run in found.items() if name.split()[0] in options.providers}


def forward(name: str, divergence: Divergence, distance: str) -> Provider:
    def run(inputs: Inputs) -> Results:
        with torch.no_grad():
            return {"divergence": divergence(inputs.logits, inputs.ref_logits)}

    # a sum of differences of log-probs, each rounded, is what the others lose of a small divergence
    cancels = distance == "close" and not name.startswith("pyllmtune")
    # ours is off by 2e-5 where about half of the tokens leave the range of the short series
    ours = 4.0 if distance == "close" else 1.0
    return Provider(name, run, slack=100.0 if cancels else ours)


def backward(name: str, divergence: Divergence, wanted: int) -> Provider:
    """Backward alone; the forward that it needs is not timed."""

    def prepare(inputs: Inputs) -> tuple[Tensor, list[Tensor], Tensor]:
        rows = [x.detach() for x in (inputs.logits, inputs.ref_logits)]
        leaves = [x.requires_grad_() for x in rows[:wanted]]
        return divergence(*rows), leaves, inputs.grad

    def run(state: tuple[Tensor, list[Tensor], Tensor]) -> Results:
        out, leaves, grad = state
        grads = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        return dict(zip(("gradient", "ref_gradient"), grads, strict=False))

    return Provider(name, run, prepare)


def cases(options: Options) -> Iterator[Case]:
    def case(
        name: str,
        shape: tuple[int, int] = (options.rows, options.vocab),
        dtype: torch.dtype = options.dtype,
        js_weight: float | None = None,
        wanted: int = 0,
        distance: str = "far",
        threads: tuple[int, ...] = options.threads,
    ) -> Case:
        size = shape[0] * shape[1] * dtype.itemsize
        found = table(options, dtype, js_weight)
        given: dict[str, Any] = {
            "draw": partial(draw, shape, dtype, DISTANCE[distance], options.device),
            "reference": partial(reference, js_weight, wanted),
            "probe": lambda inputs: inputs.logits,
        }
        return Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=dtype,
            probe_bytes=size,
            traffic=Traffic(2 * size, wanted * size),
            providers=[
                backward(word, run, wanted) if wanted else forward(word, run, distance)
                for word, run in found.items()
            ],
            threads=threads,
            **given,
        )

    yield case("forward")
    yield case("forward, close rows", distance="close")
    yield case("forward, Jensen-Shannon", js_weight=0.5)
    if options.dtype == torch.float32:
        yield case("forward", dtype=torch.bfloat16)
    yield case("backward", wanted=1)
    yield case("backward, both models", wanted=2)
    yield case("backward, Jensen-Shannon", js_weight=0.5, wanted=1)
    last = options.threads[-1:]
    for size in (512, 1024) if options.quick else (32768, 65536, 131072, 262144):
        yield case("forward over V", shape=(options.rows, size), threads=last)
    for size in (1, 3) if options.quick else (1, 8, 64, 512):
        yield case("forward over N", shape=(size, options.vocab), threads=last)
