"""temperature_softmax: cases, providers and the bytes that each must move.

S = rows * vocab * sizeof(dtype), the logits
new output        read S, write S to a new tensor
out=              read S, write S to memory that is there
backward          read the output and its upstream gradient, write S to a new tensor
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import temperature_softmax

OP = "temperature_softmax"
TEMPERATURE = 0.7
CHUNK = 16  # rows: bounds the memory of the float64 reference

Softmax = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    logits: Tensor  # [rows, V]
    grad: Tensor  # [rows, V]  upstream gradient of the result
    out: Tensor  # [rows, V]  memory that is there


def draw(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    def normal(deviation: float) -> Tensor:
        new = torch.empty(shape, dtype=dtype, device=device)
        return new.normal_(0, deviation, generator=generator)

    return Inputs(normal(3), normal(1), normal(1))


def reference(log: bool, gradient: bool, inputs: Inputs) -> Results:
    """The result, or the gradient, in float64."""
    parts = []
    for part in torch.arange(len(inputs.logits), device=inputs.logits.device).split(CHUNK):
        logits = inputs.logits[part].double().requires_grad_(gradient)
        out = temperature_softmax(logits, TEMPERATURE, log=log, backend="reference")
        if gradient:
            (out,) = torch.autograd.grad(out, logits, inputs.grad[part].double())
        parts.append(out)
    return {"gradient" if gradient else "result": torch.cat(parts)}


def eager(log: bool, logits: Tensor) -> Tensor:
    """In float32: half-precision logits divided by a temperature lose what the gate asks for."""
    function = torch.log_softmax if log else torch.softmax
    return function(logits.float() / TEMPERATURE, -1).to(logits.dtype)


def table(options: Options, dtype: torch.dtype, log: bool) -> dict[str, Softmax]:
    """Every provider asked for, by name."""
    found: dict[str, Softmax] = {
        f"pyllmtune {backend}": partial(
            temperature_softmax, temperature=TEMPERATURE, log=log, backend=backend
        )
        for backend in our_backends(options.device, dtype)
    }
    found["eager"] = partial(eager, log)
    if "torch.compile" in options.providers:
        found["torch.compile"] = torch.compile(partial(eager, log), dynamic=False, fullgraph=True)
    return {name: run for name, run in found.items() if name.split()[0] in options.providers}


def forward(softmax: Softmax, inputs: Inputs) -> Results:
    with torch.no_grad():
        return {"result": softmax(inputs.logits)}


def into_out(softmax: Softmax, inputs: Inputs) -> Results:
    with torch.no_grad():
        return {"result": softmax(inputs.logits, out=inputs.out)}


def backward(name: str, softmax: Softmax) -> Provider:
    """Backward alone; the forward that it needs is not timed."""

    def prepare(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        logits = inputs.logits.detach().requires_grad_()
        return softmax(logits), logits, inputs.grad

    def run(state: tuple[Tensor, Tensor, Tensor]) -> Results:
        result, logits, grad = state
        return {"gradient": torch.autograd.grad(result, logits, grad, retain_graph=True)[0]}

    return Provider(name, run, prepare)


def cases(options: Options) -> Iterator[Case]:
    def case(
        name: str,
        shape: tuple[int, int] = (options.rows, options.vocab),
        dtype: torch.dtype = options.dtype,
        log: bool = False,
        threads: tuple[int, ...] = options.threads,
    ) -> Case:
        size = shape[0] * shape[1] * dtype.itemsize
        traffic, learns = Traffic(size, size), name.startswith("backward")
        found = table(options, dtype, log)
        if learns:
            traffic = Traffic(2 * size, size)
            providers = [backward(word, softmax) for word, softmax in found.items()]
        elif name.startswith("out="):
            traffic = Traffic(0, rewritten=size)
            providers = [
                Provider(word, partial(into_out if "pyllmtune" in word else forward, softmax))
                for word, softmax in found.items()
            ]
        else:
            providers = [Provider(word, partial(forward, run)) for word, run in found.items()]
        given: dict[str, Any] = {
            "draw": partial(draw, shape, dtype, options.device),
            "reference": partial(reference, log, learns),
            "probe": lambda inputs: inputs.logits,
        }
        return Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=dtype,
            probe_bytes=size,
            traffic=traffic,
            providers=providers,
            threads=threads,
            **given,
        )

    yield case("new output")
    yield case("out=")
    yield case("new output, log", log=True)
    yield case("out=, log", log=True)
    if options.dtype == torch.float32:
        yield case("new output", dtype=torch.bfloat16)
        yield case("out=", dtype=torch.bfloat16)
    yield case("backward")
    yield case("backward, log", log=True)
    last = options.threads[-1:]
    for rows in (1, 3) if options.quick else (1, 8, 64, 512):
        yield case("out= over N", shape=(rows, options.vocab), threads=last)
