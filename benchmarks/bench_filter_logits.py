"""filter_logits: cases, providers and the bytes that each must move.

S = rows * vocab * sizeof(dtype): read S, write S to a new tensor, or over the logits with ``out=``.
Values checked: kept logits and the -inf between them, against the reference. The baseline adds up
in float32, so its nucleus differs by a few tokens; tests/test_benchmarks.py compares it with ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import hf_sampling
from benchmarks.bench_sample import FILTERS, Inputs, draw
from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import filter_logits

OP = "filter_logits"


def ours(filters: dict[str, Any], backend: str, inputs: Inputs) -> Results:
    return {"logits": filter_logits(inputs.logits, **filters, backend=backend)}


def eager(filters: dict[str, Any], inputs: Inputs) -> Results:
    hf_sampling.warp(inputs.logits, **filters)
    return {}


def reference(filters: dict[str, Any], inputs: Inputs) -> Results:
    parts = inputs.logits.split(4)  # bounds the memory of the sort
    return {"logits": torch.cat([filter_logits(x, **filters, backend="reference") for x in parts])}


def cases(options: Options) -> Iterator[Case]:
    shape = (options.rows, options.vocab)
    for name in ("top-k 50", "top-p .95"):
        for peaked in (True, False):
            filters, size = FILTERS[name], shape[0] * shape[1] * options.dtype.itemsize
            providers = []
            if "pyllmtune" in options.providers:
                providers = [
                    Provider(f"pyllmtune {word}", partial(ours, filters, word))
                    for word in our_backends(options.device, options.dtype)
                ]
            if "eager" in options.providers:
                providers.append(Provider("eager", partial(eager, filters)))
            yield Case(
                op=OP,
                name=f"{name}, {'peaked' if peaked else 'flat'}",
                shape=shape,
                dtype=options.dtype,
                draw=partial(draw, peaked, shape, options.dtype, options.device),
                reference=partial(reference, filters),
                probe=lambda inputs: inputs.logits,
                probe_bytes=size,
                traffic=Traffic(size, size),
                providers=providers,
                threads=options.threads,
            )
