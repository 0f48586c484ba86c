"""PPO in eager PyTorch: the recursion of GAE is a loop over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pyllmtune.demo import eager
from pyllmtune.demo.losses import Batch, Library, Loss, Objective, Sampled
from pyllmtune.demo.ppo import LAM, VALUE_COEF
from pyllmtune.demo.rollout import Outputs


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Advantages ``[B, T]`` at discount 1, from the last token to the first."""
    advantages = torch.zeros_like(values)
    carried = following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        carried = rewards[:, t] + following - values[:, t] + LAM * carried
        carried = carried * mask[:, t]
        following = values[:, t] * mask[:, t]
        advantages[:, t] = carried
    return advantages


def credit(sampled: Sampled, objective: Objective) -> Batch:
    """What followed a token, against what the critic expected; whitened over the batch."""
    mask = sampled.mask
    advantages = gae(sampled.token_rewards, sampled.values, mask)
    chosen = advantages[mask]
    white = (advantages - chosen.mean()) / (chosen.var() + 1e-8).sqrt()
    return Batch(*sampled[:5], white * mask, (advantages + sampled.values) * mask)


def loss(outputs: Outputs, batch: Batch, objective: Objective) -> Loss:
    """The policy's loss and ``VALUE_COEF`` times the critic's."""
    policy = eager.batch_loss(outputs, batch, objective)
    error = (outputs.values - batch.returns)[batch.mask]
    return policy._replace(value=policy.value + VALUE_COEF * 0.5 * (error**2).mean())


LIBRARY = Library("eager PyTorch", eager.score, credit, loss)
