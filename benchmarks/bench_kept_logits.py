"""kept_logits: log-prob and entropy over the sampler's kept set, 20 tokens a row, from hidden
states, beside the whole logits that are -inf outside it.

Bytes that must move: a row of the weight for each kept token, read, in backward read again and a
row of its gradient written. "large sets" are a tenth of the vocabulary, done by matmuls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import bench_kept_token_logprobs as sets
from benchmarks.bench_linear_token_logprobs import CHUNK, ROWS, WIDTH, objective
from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import KeptTokens, linear_token_logprobs

OP = "kept_logits"
LARGE = 0.1  # of the vocabulary


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    tokens: Tensor  # [N]
    offsets: Tensor  # [N + 1]
    ids: Tensor  # [kept]
    upstream: Tensor  # [N]

    def outside(self, rows: slice = slice(None)) -> Tensor:
        """``[N, V]`` bool, what was not kept."""
        return ~KeptTokens(self.offsets, self.ids).to_mask(self.weight.shape[0])[rows]


Score = Callable[[Inputs, Tensor, Tensor], tuple[Tensor, ...]]  # (inputs, hidden, weight)


def draw(
    shape: tuple[int, ...],
    share: float | None,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    rows, width, vocab = shape
    where = {"device": device, "generator": generator}
    if share is None:
        kept, tokens = sets.draw_kept((rows, vocab), device, generator)
    else:
        kept = KeptTokens.from_mask(torch.rand(rows, vocab, **where) < share)
        tokens = kept.token_ids[kept.offsets[:-1]].long()
    weight = torch.empty(vocab, width, dtype=dtype, device=device)
    return Inputs(
        torch.randn(rows, width, **where).to(dtype),
        weight.normal_(0, width**-0.5, generator=generator),  # logits of width 1
        tokens,
        *kept,
        torch.randn(rows, **where),
    )


def ours(backend: str, inputs: Inputs, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    kept = KeptTokens(inputs.offsets, inputs.ids)
    return linear_token_logprobs(hidden, weight, inputs.tokens, kept=kept, backend=backend)[:2]


def masked(inputs: Inputs, hidden: Tensor, weight: Tensor, rows: slice = slice(None)):
    """As trainers replay a sampler's mask today: on logits of the whole vocabulary."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return sets.masked_scores(logits, inputs.tokens[rows], inputs.outside(rows))


def run(score: Score, both: bool, inputs: Inputs) -> Results:
    hidden, weight = (x.detach().requires_grad_(both) for x in (inputs.hidden, inputs.weight))
    out = score(inputs, hidden, weight)
    results = dict(zip(("logprobs", "entropy"), out, strict=True))
    if both:
        grads = torch.autograd.grad(objective(out[:1], inputs.upstream), (hidden, weight))
        results |= dict(zip(("hidden", "weight"), grads, strict=True))
    return results


def reference(both: bool, inputs: Inputs) -> Results:
    """In float64, a chunk of rows at a time."""
    weight = inputs.weight.double().requires_grad_(both)
    by_weight, parts = torch.zeros_like(weight), []
    for first in range(0, len(inputs.tokens), CHUNK):
        rows = slice(first, first + CHUNK)
        hidden = inputs.hidden[rows].double().requires_grad_(both)
        out = masked(inputs, hidden, weight, rows)
        grads: tuple[Tensor, ...] = ()
        if both:
            total = objective(out[:1], inputs.upstream[rows].double())
            *grads, part = torch.autograd.grad(total, (hidden, weight))
            by_weight += part
        parts.append((*(value.detach() for value in out), *grads))
    whole = [torch.cat(values) for values in zip(*parts, strict=True)]
    return dict(zip(("logprobs", "entropy", "hidden"), whole, strict=False)) | {"weight": by_weight}


def cases(options: Options) -> Iterator[Case]:
    shape = (ROWS * options.rows, WIDTH, options.vocab)
    table: dict[str, Score] = {
        f"pyllmtune {backend}": partial(ours, backend)
        for backend in our_backends(options.device, options.dtype)
    }
    table["eager"] = masked
    size = options.dtype.itemsize * WIDTH
    for name, share in (
        ("forward", None),
        ("forward + backward", None),
        ("forward + backward, large sets", LARGE),
    ):
        both = "backward" in name
        row = shape[0] * (sets.KEPT if share is None else int(share * shape[2])) * size
        yield Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=options.dtype,
            draw=partial(draw, shape, share, options.dtype, options.device),
            reference=partial(reference, both),
            probe=lambda inputs: inputs.weight,
            probe_bytes=shape[2] * size,
            traffic=Traffic(2 * row, row) if both else Traffic(row),
            providers=[
                Provider(word, partial(run, score, both))
                for word, score in table.items()
                if word.split()[0] in options.providers
            ],
            threads=options.threads,
        )
