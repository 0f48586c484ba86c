"""gae: advantages and returns, beside the loop over tokens that trainers run.

Bytes that must move for a token: reward and value (4 each) and, where there is one, the mask (1)
are read, advantage and return (4 each) are written. ``torch.compile`` gets a stretch of the loop at
a time: it unrolls what it compiles, and a thousand steps take it minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench_policy_loss import lengths_of
from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import gae

OP = "gae"
GAMMA, LAM = 0.99, 0.95
STRETCH = 32  # steps that are compiled at once
CASES = ("answers", "turns between tools", "packed")


@dataclass(frozen=True)
class Inputs:
    """``[B, T]``, or packed ``[total]``."""

    rewards: Tensor
    values: Tensor
    mask: Tensor | None
    inside: Tensor | None = None  # [B, T], packed: where the tokens belong in a padded batch
    cu_seqlens: Tensor | None = None  # [B + 1], packed
    block: Tensor | None = None  # a copy of all the numbers, for the probes


def draw(name: str, shape: tuple[int, int], device: torch.device, generator: torch.Generator):
    rewards, values = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
    mask = inside = ends = None
    if name == "turns between tools":  # a quarter of the tokens, in runs of 32
        turns = (shape[0], -(-shape[1] // 32))
        mask = torch.rand(turns, device=device, generator=generator) > 0.25
        mask = mask.repeat_interleave(32, 1)[:, : shape[1]].contiguous()
    if name == "packed":
        lengths = lengths_of(shape, device)
        inside = torch.arange(shape[1], device=device) < lengths[:, None]
        rewards, values = rewards[inside], values[inside]
        ends = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    inputs = Inputs(rewards, values, mask, inside, ends)
    return replace(inputs, block=torch.cat((rewards.flatten(), values.flatten())))


def stretch(
    rewards: Tensor, values: Tensor, mask: Tensor | None, next_value: Tensor, ahead: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages of some steps, and what flows on to those before: as trainers write it."""
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        step = delta + GAMMA * LAM * ahead
        next_value = (
            values[:, t] if mask is None else torch.where(mask[:, t], values[:, t], next_value)
        )
        ahead = step if mask is None else torch.where(mask[:, t], step, ahead)
        advantages.append(ahead)
    return torch.stack(advantages[::-1], 1), next_value, ahead


def run_loop(compiled: Callable | None, x: Inputs) -> Results:
    rewards, values, mask = x.rewards, x.values, x.mask
    if x.inside is not None:
        rewards, values = (
            flat.new_zeros(x.inside.shape).masked_scatter(x.inside, flat)
            for flat in (rewards, values)
        )
    length, nothing = rewards.shape[1], rewards.new_zeros(rewards.shape[0])
    if compiled is None:
        advantages = stretch(rewards, values, mask, nothing, nothing)[0]
    else:
        state, parts = (nothing, nothing), []
        for end in range(length, 0, -STRETCH):
            cut = slice(max(end - STRETCH, 0), end)
            steps = None if mask is None else mask[:, cut]
            part, *state = compiled(rewards[:, cut], values[:, cut], steps, *state)
            parts.append(part)
        advantages = torch.cat(parts[::-1], 1)
    returns = advantages + values
    if mask is not None:
        advantages, returns = (torch.where(mask, value, 0) for value in (advantages, returns))
    if x.inside is not None:
        advantages, returns = advantages[x.inside], returns[x.inside]
    return {"advantages": advantages, "returns": returns}


def run_ours(backend: str, x: Inputs) -> Results:
    out = gae(
        x.rewards,
        x.values,
        x.mask,
        gamma=GAMMA,
        lam=LAM,
        cu_seqlens=x.cu_seqlens,
        backend=backend,
    )
    return out._asdict()


def reference(x: Inputs) -> Results:
    return run_ours("reference", replace(x, rewards=x.rewards.double(), values=x.values.double()))


def case(name: str, options: Options) -> Case:
    shape = (options.rows, options.length)
    packed = name == "packed"
    total = int(lengths_of(shape, options.device).sum()) if packed else shape[0] * shape[1]
    run: dict[str, Callable[[Inputs], Results]] = {
        f"pyllmtune {backend}": partial(run_ours, backend)
        for backend in our_backends(options.device, torch.float32)
    }
    run["eager"] = partial(run_loop, None)
    if "torch.compile" in options.providers:
        compiled = torch.compile(stretch, dynamic=False, fullgraph=True)
        run["torch.compile"] = partial(run_loop, compiled)
    return Case(
        op=OP,
        name=name,
        shape=(total,) if packed else shape,
        dtype=torch.float32,
        draw=partial(draw, name, shape, options.device),
        reference=reference,
        probe=lambda inputs: inputs.block,
        probe_bytes=8 * total,
        traffic=Traffic((8 + (name == "turns between tools")) * total, 8 * total),
        providers=[
            Provider(word, call)
            for word, call in run.items()
            if word.split()[0] in options.providers
        ],
        threads=options.threads,
    )


def cases(options: Options) -> Iterator[Case]:
    for name in CASES:
        yield case(name, options)
