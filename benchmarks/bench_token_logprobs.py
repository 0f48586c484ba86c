"""token_logprobs: cases, providers and the bytes that each must move.

S = rows * vocab * sizeof(dtype), the logits
forward               read S
forward + backward    read 2S, write S to a new gradient; in place: read S, rewrite S
backward              read S, write S; of the rows alone that have an upstream gradient
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline_token_logprobs import Score, eager, eager_with_entropy, trl
from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import token_logprobs

OP = "token_logprobs"
NAMES = ("logprobs", "entropy", "logsumexp")
ZERO_SHARE = 0.7  # of the rows: clipped, masked or without advantage
ANSWERS = 10  # whole answers are contiguous rows
VARIANTS = {"dense": "", "scattered": ", 70 % of the rows zero", "runs": ", 70 % zero in runs"}
CHUNK = 16  # rows: bounds the memory of the float64 reference


@dataclass(frozen=True)
class Inputs:
    logits: Tensor  # [rows, V]
    tokens: Tensor  # [rows]
    dense: Tensor  # [rows]  upstream gradients of the log-probs
    scattered: Tensor  # [rows]  the same, zero in 70 % of the rows
    runs: Tensor  # [rows]  the same, zero in whole answers


def draw(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    where: dict[str, Any] = {"device": device, "generator": generator}
    rows, vocab = shape
    logits = torch.empty(shape, dtype=dtype, device=device).normal_(0, 3, generator=generator)
    tokens = torch.randint(vocab, (rows,), **where)
    dense = torch.randn(rows, **where)
    zeros = round(ZERO_SHARE * rows)
    scattered, runs = dense.clone(), dense.clone()
    scattered[torch.randperm(rows, **where)[:zeros]] = 0
    answer = torch.arange(rows, device=device) * ANSWERS // rows  # [rows]
    runs[torch.randperm(ANSWERS, **where)[answer].argsort(stable=True)[:zeros]] = 0
    return Inputs(logits, tokens, dense, scattered, runs)


def reference(upstream: tuple[str, ...], inputs: Inputs) -> Results:
    """The results, and a gradient per name of ``upstream``, in float64."""
    parts: dict[str, list[Tensor]] = {}
    for part in torch.arange(len(inputs.tokens), device=inputs.tokens.device).split(CHUNK):
        logits = inputs.logits[part].double().requires_grad_(bool(upstream))
        out = token_logprobs(logits, inputs.tokens[part], backend="reference")
        for name in NAMES:
            parts.setdefault(name, []).append(getattr(out, name).detach())
        for name in upstream:
            grads = getattr(inputs, name)[part].double()
            (grad,) = torch.autograd.grad(out.logprobs, logits, grads, retain_graph=True)
            parts.setdefault(name, []).append(grad)
    return {name: torch.cat(values) for name, values in parts.items()}


def scorers(options: Options, dtype: torch.dtype, entropy: bool, inplace: bool) -> dict[str, Score]:
    """Every provider asked for, by name."""
    table: dict[str, Score] = {}
    for backend in our_backends(options.device, dtype):
        table[f"pyllmtune {backend}"] = partial(
            token_logprobs, inplace_backward=inplace, backend=backend
        )
    natural = eager_with_entropy if entropy else eager
    table["eager"] = natural
    if "torch.compile" in options.providers:
        table["torch.compile"] = torch.compile(natural, dynamic=False, fullgraph=True)
    if "trl" in options.providers:
        table["trl"] = trl(entropy)
    return {name: score for name, score in table.items() if name.split()[0] in options.providers}


def forward(score: Score, inputs: Inputs) -> Results:
    with torch.no_grad():
        return dict(zip(NAMES, score(inputs.logits, inputs.tokens), strict=False))


def with_leaf(inputs: Inputs) -> Inputs:
    return replace(inputs, logits=inputs.logits.detach().requires_grad_())


def with_copy(inputs: Inputs) -> Inputs:
    """Logits that may be overwritten: a copy, and not a leaf."""
    leaf = inputs.logits.clone().requires_grad_()
    return replace(inputs, logits=leaf.view_as(leaf))


def forward_backward(score: Score, inputs: Inputs) -> Results:
    inputs = inputs if inputs.logits.requires_grad else with_leaf(inputs)
    logprobs = score(inputs.logits, inputs.tokens)[0]
    return {"logprobs": logprobs, "dense": gradient(logprobs, inputs, "dense")}


def gradient(logprobs: Tensor, inputs: Inputs, upstream: str) -> Tensor:
    grads = getattr(inputs, upstream).to(logprobs.dtype)
    return torch.autograd.grad(logprobs, inputs.logits, grads)[0]


def backward(upstream: str, name: str, score: Score) -> Provider:
    """Backward alone; the forward that it needs is not timed."""

    def prepare(inputs: Inputs) -> tuple[Tensor, Inputs]:
        inputs = with_leaf(inputs)
        return score(inputs.logits, inputs.tokens)[0], inputs

    def run(state: tuple[Tensor, Inputs]) -> Results:
        return {upstream: gradient(*state, upstream)}

    share = 1.0 if upstream == "dense" else 1.0 - ZERO_SHARE
    return Provider(name, run, prepare, VARIANTS[upstream], share)


def cases(options: Options) -> Iterator[Case]:
    rows, vocab = options.rows, options.vocab

    def case(
        name: str,
        kind: str = "forward",
        shape: tuple[int, int] = (rows, vocab),
        dtype: torch.dtype = options.dtype,
        entropy: bool = False,
        threads: tuple[int, ...] = options.threads,
    ) -> Case:
        table = scorers(options, dtype, entropy, inplace=kind == "in place")
        size = shape[0] * shape[1] * dtype.itemsize
        upstream: tuple[str, ...] = ("dense",)
        if kind == "forward":
            traffic, upstream = Traffic(size), ()
            providers = [Provider(word, partial(forward, score)) for word, score in table.items()]
        elif kind == "backward":
            traffic, upstream = Traffic(size, size), tuple(VARIANTS)
            providers = [
                backward(name, word, score)
                for name in VARIANTS
                for word, score in table.items()
                if name == "dense" or word.startswith("pyllmtune")
            ]
        else:
            inplace = kind == "in place"
            traffic = Traffic(size, rewritten=size) if inplace else Traffic(2 * size, size)
            providers = [
                Provider(
                    word,
                    partial(forward_backward, score),
                    with_copy if inplace and word.startswith("pyllmtune") else None,
                )
                for word, score in table.items()
            ]
        return Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=dtype,
            draw=partial(draw, shape, dtype, options.device),
            reference=partial(reference, upstream),
            probe=lambda inputs: inputs.logits,
            probe_bytes=size,
            traffic=traffic,
            providers=providers,
            threads=threads,
        )

    yield case("forward")
    yield case("forward with entropy", entropy=True)
    if options.dtype == torch.float32:
        yield case("forward", dtype=torch.bfloat16)
    yield case("forward + backward", "both")
    yield case("forward + backward in place", "in place")
    yield case("backward", "backward")
    last = options.threads[-1:]
    for size in (512, 1024) if options.quick else (32768, 65536, 131072, 262144):
        yield case("forward over V", shape=(rows, size), threads=last)
    for size in (1, 3) if options.quick else (1, 2, 8, 64, 512, 4096):
        yield case("forward over N", shape=(size, vocab), threads=last)
