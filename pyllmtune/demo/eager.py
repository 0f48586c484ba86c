"""The same loss in eager PyTorch, as it is written today.

Nothing of pyllmtune is used here but the configuration's fields.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllmtune import KeptTokens, PolicyLossConfig
from pyllmtune.demo.losses import Batch, Library, Loss, Objective, Sampled, Scale, normalizer
from pyllmtune.demo.rollout import Outputs


def within(logits: Tensor, kept: KeptTokens | None) -> Tensor:
    """The logits of the kept tokens alone. Finite elsewhere, so that an entropy is."""
    if kept is None:
        return logits
    return logits.masked_fill(~kept.to_mask(logits.shape[-1]).view(logits.shape), -1e9)


def score(logits: Tensor, tokens: Tensor, mask: Tensor, kept: KeptTokens | None = None) -> Tensor:
    """Log-probs of ``tokens``, ``[B, T]``."""
    logprobs = F.log_softmax(within(logits, kept), dim=-1).gather(-1, tokens[..., None])[..., 0]
    return logprobs * mask


def advantages(rewards: Tensor, group_size: int, scale: Scale) -> Tensor:
    """Advantage of each answer within its group, ``[B]``."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "std":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    return centred.flatten()


def terms(
    logits: Tensor, batch: Batch, config: PolicyLossConfig, normalizer: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the log-probs and, per token ``[3]``, KL, entropy and share clipped. No sync."""
    mask = batch.mask.to(logits.dtype)
    lengths, total = mask.sum(1), mask.sum()

    logprobs_all = F.log_softmax(within(logits, batch.kept), dim=-1)  # [B, T, V]
    logprobs = logprobs_all.gather(-1, batch.tokens[..., None])[..., 0]  # [B, T]
    entropy = -(logprobs_all.exp() * logprobs_all).sum(-1)  # [B, T]

    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    log_ratio = (logprobs - old) * mask
    if config.level == "sequence":
        log_ratio = (log_ratio.sum(1) / lengths)[:, None].expand_as(mask)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
    advantage = batch.advantages  # one per token, or per answer
    if advantage.dim() == 1:
        advantage = advantage[:, None]
    if config.rule == "ppo":
        per_token = -torch.min(ratio * advantage, bounded * advantage)
        clipped = bounded * advantage < ratio * advantage
    else:
        per_token = -bounded.detach() * advantage * logprobs
        clipped = bounded != ratio

    delta = (batch.ref_logprobs - logprobs) * mask  # padding scores -1e9: not into exp
    kl = delta.exp() - delta - 1  # k3
    per_token = per_token + config.kl_coef * kl - config.entropy_coef * entropy

    summed = (per_token * mask).sum(1)  # [B]
    if config.aggregation == "token-mean":
        value = summed.sum() / total
    elif config.aggregation == "seq-mean-token-mean":
        value = (summed / lengths).mean()
    elif config.aggregation == "seq-mean-token-sum":
        value = summed.mean()
    else:
        value = summed.sum() / normalizer

    means = [(values.detach() * mask).sum() / total for values in (kl, entropy, clipped)]
    return value, logprobs.detach() * batch.mask, torch.stack(means)


def named(value: Tensor, logprobs: Tensor, means: Tensor) -> Loss:
    """``terms`` as a Loss."""
    names = ("kl", "entropy", "clipped")
    return Loss(value, logprobs, dict(zip(names, means.tolist(), strict=True)))


def loss(logits: Tensor, batch: Batch, config: PolicyLossConfig, normalizer: float) -> Loss:
    """The policy loss of a batch; the aggregation ``"constant"`` divides by ``normalizer``."""
    return named(*terms(logits, batch, config, normalizer))


def credit(sampled: Sampled, objective: Objective) -> Batch:
    """Each answer against the others of its group."""
    return Batch(*sampled[:5], advantages(sampled.reward, sampled.group_size, objective.scale))


def batch_loss(outputs: Outputs, batch: Batch, objective: Objective) -> Loss:
    return loss(outputs.logits, batch, objective.config, normalizer(batch))


LIBRARY = Library("eager PyTorch", score, credit, batch_loss)
