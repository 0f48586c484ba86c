"""beam_search: whole searches of four beams around a model of negligible cost, beside transformers.

"eager" is transformers' own ``generate(num_beams=4)``; the variant runs our loop inside it. Values
checked: the tokens of the best sequence, and its score, against the reference in float64.
S = sizeof(dtype) * vocab * (items + (steps - 1) * rows): the first step reads one row an item.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import beam_search

OP = "beam_search"
BEAMS = 4
EOS = 0


@dataclass(frozen=True)
class Inputs:
    logits: Tensor  # [steps, rows, V]
    model: Any  # the same for generate; None without transformers

    @property
    def items(self) -> int:
        return self.logits.shape[1] // BEAMS


def draw(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    logits = torch.empty(shape, device=device).normal_(0, 2, generator=generator).to(dtype)
    # generate starts with a copy of its prompt in each beam, beam_search with the prompt
    logits[0] = logits[0, ::BEAMS].repeat_interleave(BEAMS, dim=0)
    model = None
    if find_spec("transformers") is not None:
        from benchmarks.recorded_model import RecordedModel

        model = RecordedModel(logits)
    return Inputs(logits, model)


def ours(backend: str, inputs: Inputs, dtype: torch.dtype | None = None) -> Results:
    logits, items = inputs.logits, inputs.items

    def step(tokens: Tensor, position: list[int]) -> Tensor:
        now = logits[position[0]].to(dtype)
        position[0] += 1
        return now[::BEAMS] if len(tokens) == items else now

    out = beam_search(
        step,
        torch.ones(items, 1, dtype=torch.int64, device=logits.device),
        cache=[0],
        reorder=lambda position, rows: position,
        num_beams=BEAMS,
        max_length=len(logits),
        eos_token_id=EOS,
        length_penalty=1.0,
        backend=backend,
    )
    return {"tokens": out.tokens[:, 0], "scores": out.scores[:, 0]}


def reference(inputs: Inputs) -> Results:
    return ours("reference", inputs, dtype=torch.float64)


def generate(inputs: Inputs, custom_generate: Any = None) -> Results:
    prompts = torch.ones(inputs.items, 1, dtype=torch.int64, device=inputs.logits.device)
    out = inputs.model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        custom_generate=custom_generate,
        num_beams=BEAMS,
        max_new_tokens=len(inputs.logits),
        eos_token_id=EOS,
        pad_token_id=EOS,
        length_penalty=1.0,
        use_cache=False,
        return_dict_in_generate=True,
    )
    return {"tokens": out.sequences[:, 1:]}


def inside_generate(inputs: Inputs) -> Results:
    from pyllmtune.integrations import transformers as fused

    return generate(inputs, fused.beam_search)


def cases(options: Options) -> Iterator[Case]:
    steps = 4 if options.quick else 8
    rows = max(BEAMS, options.rows // BEAMS * BEAMS)
    shape = (steps, rows, options.vocab)
    size = steps * rows * options.vocab * options.dtype.itemsize
    names = our_backends(options.device, options.dtype)
    providers = [Provider(f"pyllmtune {word}", partial(ours, word)) for word in names]
    if find_spec("transformers") is not None:
        variant = " inside generate"
        providers.append(Provider(f"pyllmtune {names[0]}", inside_generate, variant=variant))
        providers.append(Provider("eager", generate))
    yield Case(
        op=OP,
        name="search",
        shape=shape,
        dtype=options.dtype,
        draw=partial(draw, shape, options.dtype, options.device),
        reference=reference,
        probe=lambda inputs: inputs.logits,
        probe_bytes=size,
        traffic=Traffic(size * (rows // BEAMS + (steps - 1) * rows) // (steps * rows)),
        providers=[one for one in providers if one.name.split()[0] in options.providers],
        threads=options.threads,
    )
