"""kept_token_logprobs: the sampler's kept set, 20 tokens a row, beside the dense computation on
logits that are -inf outside it: log-prob and entropy.

Bytes that must move: a logit and 4 bytes of id for each kept token, in backward again, and an
element of the gradient. The gradient of the logits is a whole [rows, V] tensor all the same.
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
from pyllmtune import KeptTokens, token_logprobs

OP = "kept_token_logprobs"
KEPT = 20  # tokens of a row, on average
ENTROPY = 0.01  # upstream gradient of the entropy
Score = Callable[["Inputs", Tensor], tuple[Tensor, Tensor]]  # -> log-probs, entropy


@dataclass(frozen=True)
class Inputs:
    logits: Tensor  # [rows, V]
    tokens: Tensor  # [rows]
    offsets: Tensor  # [rows + 1]
    ids: Tensor  # [kept]
    outside: Tensor  # [rows, V] bool, what was not kept
    upstream: Tensor  # [rows]

    @property
    def kept(self) -> KeptTokens:
        return KeptTokens(self.offsets, self.ids)


def draw_kept(
    shape: tuple[int, int], device: torch.device, generator: torch.Generator
) -> tuple[KeptTokens, Tensor]:
    """Sets of KEPT / 2 to 3 KEPT / 2 ids, and a token of each."""
    rows, vocab = shape
    bounds = (KEPT // 2, KEPT * 3 // 2 + 1)
    counts = torch.randint(*bounds, (rows,), device=device, generator=generator)
    counts = counts.clamp(max=vocab // 2)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for row, count in enumerate(counts.tolist()):
        # a few coincide in a large vocabulary: the set is then smaller
        mask[row, torch.randint(vocab, (count,), device=device, generator=generator)] = True
    kept = KeptTokens.from_mask(mask)
    chosen = torch.rand(rows, device=device, generator=generator) * kept.counts
    return kept, kept.token_ids[kept.offsets[:-1] + chosen.long()].long()


def draw(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    # of width 1: where one token of a set has all the mass, the gradient is nothing but rounding
    logits = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
    kept, tokens = draw_kept(shape, device, generator)
    upstream = torch.randn(shape[0], device=device, generator=generator)
    return Inputs(logits, tokens, *kept, ~kept.to_mask(shape[1]), upstream)


def masked_scores(logits: Tensor, tokens: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """As trainers replay a sampler's mask today."""
    logprobs = F.log_softmax(logits.masked_fill(outside, -torch.inf), -1)  # [rows, V]
    terms = torch.where(outside, 0, logprobs)
    entropy = -(terms.exp() * terms).masked_fill(outside, 0).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropy


def eager(inputs: Inputs, logits: Tensor) -> tuple[Tensor, Tensor]:
    return masked_scores(logits, inputs.tokens, inputs.outside)


def ours(backend: str, inputs: Inputs, logits: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(logits, inputs.tokens, kept=inputs.kept, backend=backend)[:2]


def run(score: Score, with_gradient: bool, inputs: Inputs) -> Results:
    logits = inputs.logits.detach().requires_grad_(with_gradient)
    logprobs, entropy = score(inputs, logits)
    results = {"logprobs": logprobs, "entropy": entropy}
    if with_gradient:
        upstream = (inputs.upstream.to(logprobs.dtype), torch.full_like(entropy, ENTROPY))
        (results["grad"],) = torch.autograd.grad((logprobs, entropy), logits, upstream)
    return results


def reference(inputs: Inputs) -> Results:
    logits = inputs.logits.double().requires_grad_()
    logprobs, entropy = eager(inputs, logits)
    upstream = (inputs.upstream.double(), torch.full_like(entropy, ENTROPY))
    (grad,) = torch.autograd.grad((logprobs, entropy), logits, upstream)
    return {"logprobs": logprobs, "entropy": entropy, "grad": grad}


def cases(options: Options) -> Iterator[Case]:
    shape = (options.rows, options.vocab)
    table: dict[str, Score] = {
        f"pyllmtune {backend}": partial(ours, backend)
        for backend in our_backends(options.device, options.dtype)
    }
    table["eager"] = eager
    if "torch.compile" in options.providers:
        table["torch.compile"] = torch.compile(eager, dynamic=False, fullgraph=True)
    entries, size = shape[0] * KEPT, options.dtype.itemsize
    for name, with_gradient in (("forward", False), ("forward + backward", True)):
        times = 2 if with_gradient else 1
        yield Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=options.dtype,
            draw=partial(draw, shape, options.dtype, options.device),
            reference=reference,
            probe=lambda inputs: inputs.ids,
            probe_bytes=4 * entries,
            traffic=Traffic(times * entries * (size + 4), (times - 1) * entries * size),
            providers=[
                Provider(word, partial(run, score, with_gradient))
                for word, score in table.items()
                if word.split()[0] in options.providers
            ],
            threads=options.threads,
        )
