"""The policy loss with its metrics in eager PyTorch, as trainers write it: the baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from pyllmtune import PolicyLossConfig

MEANS = ("clip_low_fraction", "clip_high_fraction", "approx_kl", "ratio_mean", "kl_ref", "entropy")


def eager(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref: Tensor | None,
    entropy: Tensor | None,
    owner: Tensor | None,
    batch: int,
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics as trainers write them; packed answers are summed by ``index_add``."""
    select = mask.float()

    def answers(values: Tensor) -> Tensor:  # per token -> [B]
        return (
            values.sum(-1) if owner is None else select.new_zeros(batch).index_add(0, owner, values)
        )

    def tokens(values: Tensor) -> Tensor:  # [B] -> per token
        return values[:, None] if owner is None else values[owner]

    total, lengths = select.sum(), answers(select).clamp(min=1)
    if advantages.shape != mask.shape:
        advantages = tokens(advantages)
    log_ratio = logprobs - old
    score = log_ratio
    if config.level == "sequence":
        score = tokens(answers(log_ratio * select) / lengths)
    ratio = score.exp()
    clipped = ratio.clamp(config.low, config.high)
    per_token = -torch.min(ratio * advantages, clipped * advantages)
    kl = None
    if ref is not None:
        kl = (ref - logprobs).exp() - (ref - logprobs) - 1  # k3
        per_token = per_token + config.kl_coef * kl
    if entropy is not None:
        per_token = per_token - config.entropy_coef * entropy
    if config.aggregation == "token-mean":
        loss = (per_token * select).sum() / total
    else:
        loss = (answers(per_token * select) / lengths).mean()

    with torch.no_grad():
        low = (ratio < config.low) & (advantages < 0)
        high = (ratio > config.high) & (advantages > 0)
        values = zip(MEANS, (low, high, -log_ratio, ratio, kl, entropy), strict=True)
        metrics = {name: (v * select).sum() / total for name, v in values if v is not None}
        metrics["ratio_min"] = torch.where(mask, ratio, torch.inf).amin()
        metrics["ratio_max"] = torch.where(mask, ratio, -torch.inf).amax()
    return loss, metrics
