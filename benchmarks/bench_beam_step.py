"""beam_step: items of four beams, beside log-softmax, add and topk, as beam searches do it today;
and sample_beams beside log-softmax, add, softmax and multinomial.

S = rows * vocab * sizeof(dtype), the logits: read once. Values checked: scores against float64; of
ours also parents and tokens, of which torch.topk promises no order where they tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import BeamStep, beam_step, sample_beams

OP = "beam_step"
BEAMS = 4


@dataclass(frozen=True)
class Inputs:
    logits: Tensor  # [batch, BEAMS, V]
    scores: Tensor  # [batch, BEAMS]


def draw(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    rows, vocab = shape
    logits = torch.empty(rows // BEAMS, BEAMS, vocab, device=device)
    scores = torch.empty(logits.shape[:2], device=device)
    for x, deviation in ((logits, 2), (scores, 1)):
        x.normal_(0, deviation, generator=generator)
    return Inputs(logits.to(dtype), scores - 10)


def topk(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = F.log_softmax(logits.float(), -1)  # [batch, BEAMS, V]
    best = (logprobs + scores[..., None]).flatten(1).topk(2 * BEAMS)
    vocab = logits.shape[-1]
    return best.values, best.indices // vocab, best.indices % vocab


def baseline(step: Callable[[Tensor, Tensor], tuple[Tensor, ...]], inputs: Inputs) -> Results:
    return {"scores": step(inputs.logits, inputs.scores)[0]}


def results_of(out: BeamStep) -> Results:
    return {"scores": out.scores, "parents": out.parents, "tokens": out.tokens}


def ours(backend: str, inputs: Inputs) -> Results:
    return results_of(beam_step(inputs.logits, inputs.scores, num_beams=BEAMS, backend=backend))


def reference(inputs: Inputs) -> Results:
    items = zip(inputs.logits.split(1), inputs.scores.split(1), strict=True)  # memory of one sort
    found = [
        results_of(beam_step(z.double(), s.double(), num_beams=BEAMS, backend="reference"))
        for z, s in items
    ]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def seeds(scores: Tensor) -> Tensor:
    return torch.arange(len(scores), device=scores.device)


def ours_drawn(backend: str, inputs: Inputs) -> Results:
    options = {"num_beams": BEAMS, "seed": seeds(inputs.scores), "backend": backend}
    return results_of(sample_beams(inputs.logits, inputs.scores, **options))


def multinomial(inputs: Inputs) -> Results:
    logprobs = F.log_softmax(inputs.logits.float(), -1) + inputs.scores[..., None]
    drawn = torch.multinomial(logprobs.flatten(1).softmax(-1), 2 * BEAMS)
    logprobs.flatten(1).gather(1, drawn)
    return {}  # other random numbers


def reference_drawn(inputs: Inputs) -> Results:
    parts = [
        sample_beams(z, s, num_beams=BEAMS, seed=seed, backend="reference")
        for z, s, seed in zip(
            *(x.split(1) for x in (inputs.logits, inputs.scores, seeds(inputs.scores))), strict=True
        )
    ]
    found = [results_of(part) for part in parts]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def cases(options: Options) -> Iterator[Case]:
    def case(
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype = options.dtype,
        threads: tuple[int, ...] = options.threads,
        alone: bool = False,
        drawn: bool = False,
    ) -> Case:
        size = shape[0] * shape[1] * dtype.itemsize
        run = ours_drawn if drawn else ours
        table: dict[str, Callable[[Inputs], Results]] = {
            f"pyllmtune {word}": partial(run, word) for word in our_backends(options.device, dtype)
        }
        if not alone:
            table["eager"] = multinomial if drawn else partial(baseline, topk)
        if "torch.compile" in options.providers and not alone and not drawn:
            compiled = torch.compile(topk, dynamic=False, fullgraph=True)
            table["torch.compile"] = partial(baseline, compiled)
        return Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=dtype,
            draw=partial(draw, shape, dtype, options.device),
            reference=reference_drawn if drawn else reference,
            probe=lambda inputs: inputs.logits,
            probe_bytes=size,
            traffic=Traffic(size),
            providers=[
                Provider(word, run)
                for word, run in table.items()
                if word.split()[0] in options.providers
            ],
            threads=threads,
        )

    rows, vocab = max(BEAMS, options.rows // BEAMS * BEAMS), options.vocab
    yield case("step", (rows, vocab))
    if options.dtype == torch.float32:
        yield case("step", (rows, vocab), dtype=torch.bfloat16)
    last = options.threads[-1:]
    yield case("sampled step", (rows, vocab), threads=last, drawn=True)
    yield case("one item", (BEAMS, vocab), threads=last)
    for size in (512, 1024) if options.quick else (32_768, 131_072, 262_144):
        yield case("step over V", (rows, size), threads=last, alone=True)
    for count in (8, 12) if options.quick else (16, 64, 256):
        yield case("step over N", (count, vocab), threads=last, alone=True)
