"""policy_loss, the specification, in eager torch.

Arguments are those of the operator (``pyllmtune/_ops.py``): per-token tensors are flat ``[total]``,
sequence ``i`` is ``offsets[i]:offsets[i + 1]``. Gradients come from autograd, so they check the
closed form of the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllmtune.losses.config import CONSTANTS, code
from pyllmtune.losses.metrics import SUMS
from pyllmtune.reference import policy_rules as rules


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
    choices: list[int],
    constants: list[float],
) -> tuple[Tensor, Tensor]:
    """``(loss, metrics)``: a 0-d tensor and the float64 vector of ``PolicyLossMetrics``."""
    total, sequences = logprobs.shape[0], offsets.shape[0] - 1
    owner = torch.bucketize(
        torch.arange(total, device=offsets.device), offsets[1:], right=True
    )  # [total]

    def per_sequence(values: Tensor) -> Tensor:  # [total] -> [sequences]
        return values.new_zeros(sequences).index_add(0, owner, values)

    def sequence_sum(values: Tensor) -> Tensor:  # [total] -> [total]
        return per_sequence(values)[owner]

    level, rule, kl, kl_gradient, aggregation = choices
    named = dict(zip(CONSTANTS, constants, strict=True))
    advantage = advantages if token_advantages else advantages[owner]  # [total]
    given = [logprobs, old_logprobs, advantage, ref_logprobs, entropy, weights]
    finite = torch.stack([value.isfinite() for value in given if value is not None]).all(0)
    selected = torch.ones_like(finite) if mask is None else mask  # [total]
    valid = selected & finite  # [total]

    def keep(values: Tensor) -> Tensor:  # masks select: what is masked never enters the arithmetic
        return torch.where(valid, values, 0)

    lp, old, advantage = keep(logprobs), keep(old_logprobs), keep(advantage)  # [total]
    weight = keep(torch.ones_like(lp) if weights is None else weights)  # [total]
    count = per_sequence(valid.to(lp.dtype))  # [sequences]
    filled = count > 0  # [sequences]

    score, below, above = rules.level_score(
        level, rule, named, lp, old, advantage, weight, valid, sequence_sum
    )  # [total]
    factor = torch.ones_like(weight) if rule == code("rule", "vespo") else weight
    silent = ~valid | (factor == 0)
    if rule != code("rule", "dro"):
        silent = silent | (advantage == 0)
    policy = rules.apply_rule(rule, named, score, advantage, lp, old, silent)
    value = torch.where(silent, 0, factor * policy.value)  # [total]

    delta = torch.zeros_like(lp) if ref_logprobs is None else keep(ref_logprobs) - lp  # [total]
    estimate = rules.kl_term(kl, kl_gradient, named, lp, delta, score)  # [total]
    if kl != code("kl", "none"):
        value = value + named["kl_coef"] * estimate
    if entropy is not None:
        value = value - named["entropy_coef"] * keep(entropy)
    value = keep(value)

    sums = per_sequence(value)  # [sequences]
    if aggregation == code("aggregation", "seq-mean-token-mean"):
        sums = sums / count.clamp(min=1)
    elif aggregation == code("aggregation", "length-weighted"):
        sums = sums * count
    tokens, filled = count.sum(), filled.sum().to(lp.dtype)
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
        log_ratio, ratio = lp - old, score.exp()  # [total]
        slots = {
            "tokens": valid,
            "dropped": selected & ~finite,
            "clipped_low": policy.below | below,
            "clipped_high": policy.above | above,
            "clipped_cap": policy.capped,
            "approx_kl": -log_ratio,
            "approx_kl_k3": torch.expm1(log_ratio) - log_ratio,
            "kl_ref": estimate,
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
