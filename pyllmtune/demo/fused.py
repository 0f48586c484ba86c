"""The policy loss through pyllmtune: one read of the logits, one pass over the tokens."""

from __future__ import annotations

from torch import Tensor

import pyllmtune
from pyllmtune import KeptTokens, PolicyLossConfig
from pyllmtune.demo.losses import Batch, Library, Loss, Objective, Sampled, Scale, normalizer
from pyllmtune.demo.rollout import Outputs


def score(logits: Tensor, tokens: Tensor, mask: Tensor, kept: KeptTokens | None = None) -> Tensor:
    """Log-probs of ``tokens``, ``[B, T]``."""
    return pyllmtune.token_logprobs(logits, tokens, mask=mask, kept=kept).logprobs


def advantages(rewards: Tensor, group_size: int, scale: Scale) -> Tensor:
    """Advantage of each answer within its group, ``[B]``."""
    return pyllmtune.group_advantages(rewards, group_size=group_size, scale=scale)


def loss(logits: Tensor, batch: Batch, config: PolicyLossConfig, normalizer: float) -> Loss:
    """The policy loss of a batch; the aggregation ``"constant"`` divides by ``normalizer``."""
    scored = pyllmtune.token_logprobs(logits, batch.tokens, mask=batch.mask, kept=batch.kept)
    logprobs = scored.logprobs.detach()
    value, metrics = pyllmtune.policy_loss(
        scored.logprobs,
        logprobs if batch.old_logprobs is None else batch.old_logprobs,
        batch.advantages,
        batch.mask,
        ref_logprobs=batch.ref_logprobs,
        entropy=scored.entropy,
        normalizer=normalizer if config.aggregation == "constant" else None,
        config=config,
    )
    measured = metrics.to_dict()
    shown = {
        "kl": measured["kl_ref"],
        "entropy": measured["entropy"],
        "clipped": measured["clip_low_fraction"] + measured["clip_high_fraction"],
    }
    return Loss(value, logprobs, shown)


def credit(sampled: Sampled, objective: Objective) -> Batch:
    """Each answer against the others of its group."""
    return Batch(*sampled[:5], advantages(sampled.reward, sampled.group_size, objective.scale))


def batch_loss(outputs: Outputs, batch: Batch, objective: Objective) -> Loss:
    return loss(outputs.logits, batch, objective.config, normalizer(batch))


LIBRARY = Library("pyllmtune", score, credit, batch_loss)
