"""What training takes from a library: scores of tokens, credit for answers, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyllmtune import KeptTokens, PolicyLossConfig
from pyllmtune.demo.rollout import ANSWER_LENGTH, Outputs

Scale = Literal["std", "none"]
_DEFAULT = PolicyLossConfig()


@dataclass(frozen=True)
class Objective:
    """A named loss: how rewards become advantages, and what is done with them."""

    scale: Scale = "none"
    config: PolicyLossConfig = _DEFAULT
    updates: int = 2  # optimiser steps per rollout: at the second the ratio is not 1
    critic: bool = False  # a value head estimates what is to come
    offline: bool = False  # the answers are the supervised model's, whatever the policy does
    learning_rate: float = 1e-3  # of AdamW, at its peak


def objectives(kl_coef: float, entropy_coef: float) -> dict[str, Objective]:
    """The losses of ``--loss``, all with a k3 estimate of the KL to the supervised model."""

    def config(**fields: object) -> PolicyLossConfig:
        return PolicyLossConfig(kl="k3", kl_coef=kl_coef, entropy_coef=entropy_coef, **fields)

    return {
        "grpo": Objective("std", config(aggregation="seq-mean-token-mean")),
        "dapo": Objective("std", config(eps_high=0.28)),
        "dr_grpo": Objective("none", config(aggregation="constant")),
        "gspo": Objective(
            "std",
            config(
                level="sequence", eps_low=0.05, eps_high=0.05, aggregation="seq-mean-token-mean"
            ),
        ),
        "cispo": Objective("std", config(rule="cispo", eps_low=1.0, eps_high=0.28)),
    }


class Sampled(NamedTuple):
    """One rollout with its rewards. B answers of at most T tokens, groups in neighbouring rows."""

    tokens: Tensor  # [B, T] int64, padded
    mask: Tensor  # [B, T] bool, the tokens of the answer
    old_logprobs: Tensor  # [B, T], of the policy that answered
    ref_logprobs: Tensor  # [B, T]
    kept: KeptTokens | None  # all log-probs are of these tokens alone
    reward: Tensor  # [B]
    group_size: int
    values: Tensor | None  # [B, T], with a critic

    @property
    def token_rewards(self) -> Tensor:
        """``[B, T]``: an answer is paid at its last token."""
        last = self.mask & (self.mask.cumsum(1) == self.mask.sum(1, keepdim=True))
        return torch.where(last, self.reward[:, None], 0.0)


class Batch(NamedTuple):
    """What an update holds fixed."""

    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    old_logprobs: Tensor | None  # [B, T]; None: the policy has not moved yet
    ref_logprobs: Tensor  # [B, T]
    kept: KeptTokens | None = None
    advantages: Tensor | None = None  # [B] or [B, T]
    returns: Tensor | None = None  # [B, T], what the critic learns
    pairs: tuple[Tensor, Tensor] | None = None  # rows of the better and of the worse answers


def normalizer(batch: Batch) -> float:
    """For the aggregation ``"constant"``: every answer counts as one of the greatest length."""
    return float(len(batch.tokens) * ANSWER_LENGTH)


class Loss(NamedTuple):
    """A loss to call backward on, and what was measured with it."""

    value: Tensor
    logprobs: Tensor  # [B, T], detached: the old ones of the updates that follow
    metrics: dict[str, float]  # kl, entropy, clipped, preferred


class Library(NamedTuple):
    """One way to compute it all. Logits are ``[B, T, V]``, row t for token t."""

    name: str
    # (logits, tokens, mask, kept) -> logprobs [B, T]
    score: Callable[[Tensor, Tensor, Tensor, KeptTokens | None], Tensor]
    credit: Callable[[Sampled, Objective], Batch]
    loss: Callable[[Outputs, Batch, Objective], Loss]
