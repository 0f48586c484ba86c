"""sample: cases, providers and the bytes that each must move.

S = rows * vocab * sizeof(dtype), the logits: read once. Values checked: our tokens are those of the
reference, to the token; the baseline has random numbers of its own, and tests/test_benchmarks.py
compares its kept sets with ours. "peaked" rows are what models emit (the first token holds most of
the mass), "flat" ones are normal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import hf_sampling
from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import sample

OP = "sample"
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k 50": {"top_k": 50},
    "top-p .95": {"top_p": 0.95},
}
EXTRAS = {"logprobs": "processed", "return_stats": "rank"}
EVERYTHING = {"logprobs": ("raw", "processed"), "return_stats": True}


@dataclass(frozen=True)
class Inputs:
    logits: Tensor  # [rows, V]


def draw(
    peaked: bool,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    """Peaked: normal of deviation 2, 39 peaks of 10 to 16 above it, and one that leads them."""
    logits = torch.empty(shape, device=device).normal_(0, 2 if peaked else 1, generator=generator)
    if peaked:
        ids = torch.randint(0, shape[1], (shape[0], 40), device=device, generator=generator)
        heights = torch.rand(ids.shape, device=device, generator=generator) * 6 + 10
        heights[:, 0] = 22
        logits.scatter_(1, ids, heights)
    return Inputs(logits.to(dtype))


def seeds(logits: Tensor) -> Tensor:
    return torch.arange(len(logits), device=logits.device)


def ours(filters: dict[str, Any], extras: dict[str, Any], backend: str, inputs: Inputs) -> Results:
    logits = inputs.logits
    out = sample(logits, **filters, **extras, seed=seeds(logits), backend=backend)
    return {"tokens": out.tokens}


def eager(filters: dict[str, Any], inputs: Inputs) -> Results:
    hf_sampling.sample(inputs.logits, **filters)
    return {}


def greedy_eager(inputs: Inputs) -> Results:
    return {"tokens": inputs.logits.argmax(-1)}


def reference(filters: dict[str, Any], inputs: Inputs) -> Results:
    logits = inputs.logits
    parts = [
        sample(logits[rows], **filters, seed=rows, backend="reference").tokens
        for rows in seeds(logits).split(4)  # bounds the memory of the sort
    ]
    return {"tokens": torch.cat(parts)}


def cases(options: Options) -> Iterator[Case]:
    def case(
        name: str,
        filters: dict[str, Any],
        peaked: bool = True,
        shape: tuple[int, int] = (options.rows, options.vocab),
        dtype: torch.dtype = options.dtype,
        threads: tuple[int, ...] = options.threads,
        baseline: Callable[[Inputs], Results] | None = None,
        alone: bool = False,
        with_extras: bool = False,
    ) -> Case:
        size = shape[0] * shape[1] * dtype.itemsize
        names = our_backends(options.device, dtype) if "pyllmtune" in options.providers else []
        run = partial(ours, filters)
        providers = [Provider(f"pyllmtune {word}", partial(run, {}, word)) for word in names]
        if with_extras:
            # the kept set of a plain draw is the vocabulary: N * V ids are no extra, but a result
            kept = {"return_kept": bool(filters)}
            end = ", kept set" if filters else ""
            variants = {f" with log-prob, rank{end}": EXTRAS | kept}
            variants[f" with raw log-prob, all statistics{end}"] = EVERYTHING | kept
            providers += [
                Provider(f"pyllmtune {word}", partial(run, extras, word), variant=variant)
                for word in names[:1]
                for variant, extras in variants.items()
            ]
        if "eager" in options.providers and not alone:
            providers.append(Provider("eager", baseline or partial(eager, filters)))
        return Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=dtype,
            draw=partial(draw, peaked, shape, dtype, options.device),
            reference=partial(reference, filters),
            probe=lambda inputs: inputs.logits,
            probe_bytes=size,
            traffic=Traffic(size),
            providers=providers,
            threads=threads,
        )

    for name, filters in FILTERS.items():
        yield case(f"{name}, peaked", filters, with_extras=True)
    for name, filters in FILTERS.items():
        yield case(f"{name}, flat", filters, peaked=False)
    yield case("greedy", {"temperature": 0.0}, baseline=greedy_eager)
    if options.dtype == torch.float32:
        yield case("top-p .95, peaked", FILTERS["top-p .95"], dtype=torch.bfloat16)
    last, one_row = options.threads[-1:], (1, options.vocab)
    for name in ("plain", "top-p .95"):
        yield case(f"one row, {name}", FILTERS[name], shape=one_row, threads=last)
    for rows in (1, 3) if options.quick else (4, 16, 256):
        size = (rows, options.vocab)
        yield case("top-p .95 over N", FILTERS["top-p .95"], shape=size, threads=last, alone=True)
    for vocab in (512, 1024) if options.quick else (32_768, 131_072, 262_144):
        size = (options.rows, vocab)
        yield case("top-p .95 over V", FILTERS["top-p .95"], shape=size, threads=last, alone=True)
