"""linear_token_logprobs: cases and providers, beside the bare matmuls that nobody can avoid.

Forward is one matmul of 2 N D V operations, forward and backward are three; "matmul" runs exactly
those, in the operands' dtype, with torch's. The peak memory of each provider is in its row. The
bytes that must move, operands and gradients, are a small share of the time at these shapes.
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
from benchmarks.machine import outside_the_source_tree
from benchmarks.options import Options
from pyllmtune import linear_token_logprobs

OP = "linear_token_logprobs"
WIDTH = 896  # D of a model of half a billion parameters, whose head is a third of it
ROWS = 8  # times --rows: 512 tokens
ENTROPY = 0.1
CHUNK = 64  # rows: bounds the memory of the float64 reference

# hidden [N, D], weight [V, D], tokens [N] -> log-probs and, where asked for, entropy [N]
Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    tokens: Tensor  # [N]
    upstream: Tensor  # [N]


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    rows, width, vocab = shape
    where: dict[str, Any] = {"device": device, "generator": generator}
    weight = torch.empty(vocab, width, dtype=dtype, device=device)
    return Inputs(
        torch.randn(rows, width, **where).to(dtype),
        weight.normal_(0, 3 / width**0.5, generator=generator),
        torch.randint(vocab, (rows,), **where),
        torch.randn(rows, **where),
    )


def reference(entropy: bool, both: bool, inputs: Inputs) -> Results:
    """In float64, a chunk of rows at a time."""
    weight = inputs.weight.double().requires_grad_(both)
    parts: dict[str, list[Tensor]] = {"logprobs": [], "entropy": [], "hidden": []}
    by_weight = torch.zeros_like(weight) if both else None
    for part in torch.arange(len(inputs.tokens), device=inputs.tokens.device).split(CHUNK):
        hidden = inputs.hidden[part].double().requires_grad_(both)
        out = linear_token_logprobs(hidden, weight, inputs.tokens[part], backend="reference")
        parts["logprobs"].append(out.logprobs.detach())
        parts["entropy"].append(out.entropy.detach())
        if by_weight is not None:
            total = objective(out if entropy else out[:1], inputs.upstream[part].double())
            grads = torch.autograd.grad(total, (hidden, weight))
            parts["hidden"].append(grads[0])
            by_weight += grads[1]
    results = {name: torch.cat(values) for name, values in parts.items() if values}
    return results if by_weight is None else results | {"weight": by_weight}


def objective(out: tuple[Tensor, ...], upstream: Tensor) -> Tensor:
    total = (out[0] * upstream.to(out[0].dtype)).sum()
    return total - ENTROPY * out[1].sum() if len(out) > 1 else total


def eager(entropy: bool) -> Score:
    def score(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logprobs = F.log_softmax((hidden @ weight.T).float(), dim=-1)
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
        return (chosen, -(logprobs.exp() * logprobs).sum(-1)) if entropy else (chosen,)

    return score


def chunked(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """torch's own function; it has no entropy."""
    return (-F.linear_cross_entropy(hidden, weight, tokens, reduction="none"),)


def trl(entropy: bool) -> Score:
    """The function of TRL's trainers; no gradient flows through its entropy."""
    with outside_the_source_tree():
        from trl.kernels import ChunkedLogProbFunction

    outputs = ("entropy",) if entropy else ()

    def score(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, None, tokens, 1.0, 8192, None, 1.0, outputs)
        out = ChunkedLogProbFunction.apply(*arguments)
        return tuple(value for value in out[: 1 + entropy] if value is not None)

    return score


def scorers(options: Options, dtype: torch.dtype, entropy: bool, both: bool) -> dict[str, Score]:
    """Every provider asked for that computes this, by name."""
    table: dict[str, Score] = {}
    for backend in our_backends(options.device, dtype):

        def ours(*arguments: Tensor, backend: str = backend) -> tuple[Tensor, ...]:
            return tuple(linear_token_logprobs(*arguments, backend=backend)[: 1 + entropy])

        table[f"pyllmtune {backend}"] = ours
    natural = eager(entropy)
    table["eager"] = natural
    if "torch.compile" in options.providers:
        table["torch.compile"] = torch.compile(natural, dynamic=False, fullgraph=True)
    if not entropy and hasattr(F, "linear_cross_entropy"):
        table["F.linear_cross_entropy"] = chunked
    if "trl" in options.providers and not (entropy and both):
        table["trl"] = trl(entropy)
    return {name: score for name, score in table.items() if name.split()[0] in options.providers}


def forward(score: Score, ours: bool, inputs: Inputs) -> Results:
    with torch.no_grad():
        return named(score(inputs.hidden, inputs.weight, inputs.tokens), inputs, ours)


def named(out: tuple[Tensor, ...], inputs: Inputs, ours: bool) -> Results:
    """Others round their logits to the operands' dtype, and are judged by that."""
    dtype = out[0].dtype if ours else inputs.hidden.dtype
    return {
        name: value.to(dtype) for name, value in zip(("logprobs", "entropy"), out, strict=False)
    }


def forward_backward(score: Score, ours: bool, inputs: Inputs) -> Results:
    hidden, weight = (x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight))
    out = score(hidden, weight, inputs.tokens)
    grads = torch.autograd.grad(objective(out, inputs.upstream), (hidden, weight))
    return named(out, inputs, ours) | dict(zip(("hidden", "weight"), grads, strict=True))


def matmuls(both: bool, inputs: Inputs) -> Results:
    """Whatever they are multiplied with, these must be: results of the same size, not compared."""
    logits = inputs.hidden @ inputs.weight.T
    if both:
        _ = logits @ inputs.weight, logits.T @ inputs.hidden
    return {}


def cases(options: Options) -> Iterator[Case]:
    standard = (ROWS * options.rows, WIDTH, options.vocab)

    def case(
        name: str,
        shape: tuple[int, ...] = standard,
        dtype: torch.dtype = options.dtype,
        threads: tuple[int, ...] = options.threads,
    ) -> Case:
        entropy, both = "entropy" in name, "backward" in name
        table = scorers(options, dtype, entropy, both)
        run = forward_backward if both else forward
        # ours rounds the logits' gradient and then a sum; others round logits of 16 to steps of 1/8
        two, many = (1.0, 1.0) if dtype == torch.float32 else (2.0, 32.0)
        if entropy and both:  # p (g + 0.1 (log p + H)) cancels: a row of dW may be all such terms
            two, many = 4 * two, 4 * many
        providers = [
            Provider(word, partial(run, score, ours), slack=two if ours else many)
            for word, score in table.items()
            for ours in (word.startswith("pyllmtune"),)
        ]
        if "matmul" in options.providers:
            providers.append(Provider("matmul", partial(matmuls, both)))
        size = (shape[0] + shape[2]) * shape[1] * dtype.itemsize
        return Case(
            op=OP,
            name=name,
            shape=shape,
            dtype=dtype,
            draw=partial(draw, shape, dtype, options.device),
            reference=partial(reference, entropy, both),
            probe=lambda inputs: inputs.weight,
            probe_bytes=shape[2] * shape[1] * dtype.itemsize,
            traffic=Traffic(2 * size, size) if both else Traffic(size),
            providers=providers,
            threads=threads,
        )

    others = [torch.bfloat16] if options.dtype == torch.float32 else []
    for dtype in (options.dtype, *others):
        yield case("forward", dtype=dtype)
        yield case("forward with entropy", dtype=dtype)
        yield case("forward + backward", dtype=dtype)
        yield case("forward + backward with entropy", dtype=dtype)
    last = options.threads[-1:]
    for size in (16, 48) if options.quick else (32, 128, 2048):
        yield case("forward over N", (size, WIDTH, options.vocab // 4), threads=last)
    for size in (64, 200) if options.quick else (256, 2048, 4096):
        yield case("forward over D", (standard[0] // 4, size, options.vocab // 4), threads=last)
