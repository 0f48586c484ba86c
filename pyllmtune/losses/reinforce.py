"""REINFORCE as a configuration of ``policy_loss``."""

from __future__ import annotations

from torch import Tensor

from pyllmtune._backend import Backend
from pyllmtune.losses.config import Aggregation, PolicyLossConfig
from pyllmtune.ops.policy_loss import PolicyLossOutput, policy_loss


def reinforce_loss(
    logprobs: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "seq-mean-token-sum",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """REINFORCE (Williams 1992): ``-R log pi``, whose gradient is that of the expected reward when
    the answers were drawn from the policy itself. Arguments as in ``policy_loss``.

    Args:
        rewards: ``[B]`` or ``[B, T]``; subtract a baseline (``group_advantages``) for less noise.
        aggregation: the sum over an answer's tokens is the log-prob of the answer, so the mean
            over answers of these sums is the estimate of the expectation.

    >>> import torch
    >>> reinforce_loss(torch.tensor([[-1.0, -0.5]]), torch.tensor([2.0])).loss
    tensor(3.)
    """
    # at ratio 1, inside the bounds, CISPO's constant weight is 1 and -A logprob is left
    config = PolicyLossConfig(rule="cispo", entropy_coef=entropy_coef, aggregation=aggregation)
    return policy_loss(
        logprobs,
        logprobs.detach(),
        rewards,
        mask,
        cu_seqlens=cu_seqlens,
        entropy=entropy,
        normalizer=normalizer,
        config=config,
        backend=backend,
    )
