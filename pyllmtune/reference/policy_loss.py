"""policy_loss, the specification, in eager torch.

Arguments are those of the operator (``pyllmtune/_ops.py``): per-token tensors are flat ``[total]``,
sequence ``i`` is ``offsets[i]:offsets[i + 1]``. Gradients come from autograd, so they check the
closed form of the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllmtune.losses.config import code
from pyllmtune.losses.metrics import SUMS


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    token_advantages: bool,
    offsets: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor | None,
    normalizer: float,
    device_normalizer: Tensor | None,
    level: int,
    rule: int,
    kl: int,
    aggregation: int,
    low: float,
    high: float,
    cap: float,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Tensor]:
    """``(loss, metrics)``: a 0-d tensor and the float64 vector of ``PolicyLossMetrics``."""
    total, sequences = logprobs.shape[0], offsets.shape[0] - 1
    owner = torch.bucketize(
        torch.arange(total, device=offsets.device), offsets[1:], right=True
    )  # [total]

    def per_sequence(values: Tensor) -> Tensor:  # [total] -> [sequences]
        return values.new_zeros(sequences).index_add(0, owner, values)

    selected = logprobs.new_ones(total, dtype=torch.bool) if mask is None else mask  # [total]
    finite = old_logprobs.isfinite()
    if ref_logprobs is not None:
        finite = finite & ref_logprobs.isfinite()
    valid = selected & finite  # [total]

    def keep(values: Tensor) -> Tensor:  # masks select: what is masked never enters the arithmetic
        return torch.where(valid, values, 0)

    lp, old = keep(logprobs), keep(old_logprobs)  # [total]
    advantage = keep(advantages if token_advantages else advantages[owner])  # [total]
    weight = keep(torch.ones_like(lp) if weights is None else weights)  # [total]
    count = per_sequence(valid.to(lp.dtype))  # [sequences]
    per_token = 1.0 / count.clamp(min=1)  # [sequences]

    log_ratio = lp - old  # [total]
    score = (
        log_ratio
        if level == code("level", "token")
        else (per_sequence(log_ratio) * per_token)[owner]
    )

    # the rule; a clipped or silenced token leaves the graph before exp, so that an overflowed ratio
    # has no gradient
    ratio = score.detach().exp()  # [total]
    if rule == code("rule", "ppo"):
        negative = advantage < 0
        below, above = negative & (ratio < low), ~negative & (ratio > high)
        capped = negative & (ratio > cap)
        clipped = below | above | capped
        free = torch.where(clipped | (weight == 0), 0, score).exp()
        bounded = free.masked_fill(below, low).masked_fill(above, high)
        value = -bounded.masked_fill(capped, cap) * advantage  # [total]
    else:
        below, above = ratio < low, ratio > high
        capped = torch.zeros_like(below)
        value = -ratio.clamp(low, high) * torch.where(advantage == 0, 0, advantage * lp)  # [total]
        value = torch.where(advantage == 0, 0, value)
    value = torch.where(weight == 0, 0, weight * value)

    delta = torch.zeros_like(lp) if ref_logprobs is None else keep(ref_logprobs) - lp  # [total]
    estimates = (None, -delta, delta**2 / 2, torch.expm1(delta) - delta)
    if kl != code("kl", "none"):
        value = value + kl_coef * estimates[kl]
    if entropy is not None:
        value = value - entropy_coef * keep(entropy)
    value = keep(value)

    sums = per_sequence(value)  # [sequences]
    if aggregation == code("aggregation", "seq-mean-token-mean"):
        sums = sums * per_token
    tokens, filled = count.sum(), (count > 0).sum().to(lp.dtype)
    if device_normalizer is not None:
        divisor = device_normalizer.to(lp.dtype)
    elif normalizer != 0.0:
        divisor = torch.full_like(tokens, normalizer)
    else:
        divisor = tokens if aggregation == code("aggregation", "token-mean") else filled
    scale = torch.where(
        tokens > 0, 1.0 / divisor, 0
    )  # no valid token: loss 0, whatever the divisor
    loss = sums.sum() * scale

    with torch.no_grad():
        shown_kl = estimates[kl if kl != code("kl", "none") else code("kl", "k3")]
        slots = {
            "tokens": valid,
            "dropped": selected & ~finite,
            "clipped_low": below,
            "clipped_high": above,
            "clipped_cap": capped,
            "approx_kl": -log_ratio,
            "approx_kl_k3": torch.expm1(log_ratio) - log_ratio,
            "kl_ref": shown_kl,
            "ratio": ratio,
            "ratio_squared": ratio**2,
            "entropy": torch.zeros_like(lp) if entropy is None else entropy,
            "weight": weight,
        }
        row = {
            name: (slot if name == "dropped" else torch.where(valid, slot, 0)).double().sum()
            for name, slot in slots.items()
        }
        row["sequences"], row["loss"] = filled.double(), sums.double().sum()
        extremes = [torch.where(valid, value, -math.inf).double() for value in (-ratio, ratio)]
        nothing = extremes[0].new_full((1,), -math.inf)  # so that an empty batch has a maximum
        extremes = [torch.cat((value, nothing)).amax() for value in extremes]
        metrics = torch.stack([row[name] for name in SUMS] + extremes)
    return loss, metrics
