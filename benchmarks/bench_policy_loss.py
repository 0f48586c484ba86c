"""policy_loss: forward, backward and metrics, beside the eager chain that trainers run.

Bytes that must move for a token: log-prob, old log-prob and, where the preset has them, its own
advantage, the reference and the entropy (4 each) and the mask (1) are read; a gradient for the
log-prob and one for the entropy are written (4 each).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.baseline_policy_loss import eager
from benchmarks.cases import Case, Provider, Results, Traffic, our_backends
from benchmarks.options import Options
from pyllmtune import PolicyLossConfig, policy_loss

OP = "policy_loss"
PRESETS = {
    "ppo token level": PolicyLossConfig(),
    "grpo with k3 and entropy": PolicyLossConfig(
        kl="k3", kl_coef=0.04, entropy_coef=0.01, aggregation="seq-mean-token-mean"
    ),
    "gspo sequence level": PolicyLossConfig(
        level="sequence", eps_low=3e-4, eps_high=4e-4, aggregation="seq-mean-token-mean"
    ),
}
NEAR = 1e-5  # to a clip bound, where one ulp decides: such ratios are drawn as 1
Chain = Callable[..., tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Inputs:
    """Per-token tensors are ``[B, T]``, or packed ``[total]``."""

    logprobs: Tensor
    old: Tensor
    advantages: Tensor  # [B]; at token level one per token
    mask: Tensor
    ref: Tensor | None
    entropy: Tensor | None
    owner: Tensor | None = None  # [total], packed: the answer of each token
    cu_seqlens: Tensor | None = None  # [B + 1], packed
    block: Tensor | None = None  # a copy of all the numbers, for the probes

    def leaves(self) -> list[Tensor]:
        """What the loss is differentiated by."""
        return [value for value in (self.logprobs, self.entropy) if value is not None]

    def numbers(self) -> list[Tensor]:
        """What is read per token, except the mask."""
        values = (self.logprobs, self.old, self.advantages, self.ref, self.entropy)
        return [v for v in values if v is not None and v.shape == self.mask.shape]


def lengths_of(shape: tuple[int, int], device: torch.device) -> Tensor:
    """``[B]``: answers fill a quarter to the whole of the row, evenly spread."""
    batch, length = shape
    share = torch.linspace(0.25, 1.0, batch, dtype=torch.float64, device=device)
    return (share * length).ceil().long()


def draw(
    config: PolicyLossConfig,
    packed: bool,
    shape: tuple[int, int],
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    batch, length = shape
    order = torch.randperm(batch, device=device, generator=generator)
    lengths = lengths_of(shape, device)[order]
    mask = torch.arange(length, device=device) < lengths[:, None]  # [B, T]
    log_ratio = 0.1 * normal(*shape) + 0.02 * normal(batch, 1)
    ratio = log_ratio.exp()
    near = ((ratio - config.low).abs() < NEAR) | ((ratio - config.high).abs() < NEAR)
    logprobs = -normal(*shape).abs() * 2
    inputs = Inputs(
        logprobs,
        torch.where(near, logprobs, logprobs - log_ratio),
        normal(*shape) if config.aggregation == "token-mean" else normal(batch),
        mask,
        logprobs + 0.2 * normal(*shape) if config.kl != "none" else None,
        normal(*shape).abs() if config.entropy_coef else None,
    )
    if packed:
        kept = {name: v[mask] for name, v in vars(inputs).items() if v is not None and v.dim() == 2}
        owner = torch.arange(batch, device=device).repeat_interleave(lengths)
        ends = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        inputs = replace(inputs, **kept, owner=owner, cu_seqlens=ends)
    inputs = replace(inputs, block=torch.cat([value.flatten() for value in inputs.numbers()]))
    for leaf in inputs.leaves():
        leaf.requires_grad_()
    return inputs


def run_chain(chain: Chain, batch: int, config: PolicyLossConfig, x: Inputs) -> Results:
    loss, metrics = chain(
        x.logprobs, x.old, x.advantages, x.mask, x.ref, x.entropy, x.owner, batch, config
    )
    grads = torch.autograd.grad(loss, x.leaves())
    values = torch.stack(tuple(metrics.values())).tolist()  # one transfer from a GPU
    return named(loss, grads, dict(zip(metrics, values, strict=True)))


def run_ours(backend: str, config: PolicyLossConfig, x: Inputs) -> Results:
    out = policy_loss(
        x.logprobs,
        x.old,
        x.advantages,
        x.mask,
        cu_seqlens=x.cu_seqlens,
        ref_logprobs=x.ref,
        entropy=x.entropy,
        config=config,
        backend=backend,
    )
    metrics = out.metrics.to_dict()
    del metrics["loss_sum"]  # the loss again, but with no size to measure its error by
    return named(out.loss, torch.autograd.grad(out.loss, x.leaves()), metrics)


def named(loss: Tensor, grads: tuple[Tensor, ...], metrics: dict[str, float]) -> Results:
    names = ("grad_logprobs", "grad_entropy")
    return {"loss": loss, **dict(zip(names, grads, strict=False)), **metrics}


def reference(config: PolicyLossConfig, x: Inputs) -> Results:
    double = {
        name: value.detach().double()
        for name, value in vars(x).items()
        if value is not None and value.is_floating_point()
    }
    x = replace(x, **double)
    for leaf in x.leaves():
        leaf.requires_grad_()
    return run_ours("reference", config, x)


def case(name: str, config: PolicyLossConfig, packed: bool, options: Options) -> Case:
    shape = (options.rows, options.length)
    total = int(lengths_of(shape, options.device).sum()) if packed else shape[0] * shape[1]
    gradients = 1 + (config.entropy_coef != 0)
    numbers = 1 + (config.aggregation == "token-mean") + (config.kl != "none") + gradients
    chains: dict[str, Chain] = {"eager": eager}
    if "torch.compile" in options.providers:
        chains["torch.compile"] = torch.compile(eager, dynamic=False, fullgraph=True)
    run = {
        f"pyllmtune {backend}": partial(run_ours, backend, config)
        for backend in our_backends(options.device, torch.float32)
    } | {word: partial(run_chain, chain, options.rows, config) for word, chain in chains.items()}
    return Case(
        op=OP,
        name=name + (", packed" if packed else ""),
        shape=(total,) if packed else shape,
        dtype=torch.float32,
        draw=partial(draw, config, packed, shape, options.device),
        reference=partial(reference, config),
        probe=lambda inputs: inputs.block,
        probe_bytes=4 * numbers * total,
        traffic=Traffic((4 * numbers + 1) * total, 4 * gradients * total),
        providers=[
            Provider(word, call)
            for word, call in run.items()
            if word.split()[0] in options.providers
        ],
        threads=options.threads,
    )


def cases(options: Options) -> Iterator[Case]:
    for packed in (False, True):
        for name, config in PRESETS.items():
            yield case(name, config, packed, options)
