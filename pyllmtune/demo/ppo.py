"""PPO through pyllmtune: advantages of tokens from a critic, and a loss for both of them."""

from __future__ import annotations

import pyllmtune
from pyllmtune.demo import fused
from pyllmtune.demo.losses import Batch, Library, Loss, Objective, Sampled
from pyllmtune.demo.rollout import Outputs

LAM = 0.95
VALUE_COEF = 0.5


def credit(sampled: Sampled, objective: Objective) -> Batch:
    """What followed a token, against what the critic expected; whitened over the batch."""
    advantages, returns = pyllmtune.gae(
        sampled.token_rewards, sampled.values, sampled.mask, lam=LAM
    )
    return Batch(*sampled[:5], pyllmtune.whiten(advantages, sampled.mask), returns)


def loss(outputs: Outputs, batch: Batch, objective: Objective) -> Loss:
    """The policy's loss and ``VALUE_COEF`` times the critic's."""
    policy = fused.batch_loss(outputs, batch, objective)
    critic = pyllmtune.value_loss(outputs.values, batch.returns, batch.mask).loss
    return policy._replace(value=policy.value + VALUE_COEF * critic)


LIBRARY = Library("pyllmtune", fused.score, credit, loss)
