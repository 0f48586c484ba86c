"""What GRPO takes from a library: scores of tokens, advantages of groups, and the policy loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from pyllmtune import PolicyLossConfig
from pyllmtune.demo.rollout import ANSWER_LENGTH

Scale = Literal["std", "none"]


@dataclass(frozen=True)
class Objective:
    """A named loss: how rewards become advantages, and what is done with them."""

    scale: Scale
    config: PolicyLossConfig


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


class Batch(NamedTuple):
    """One rollout: what an update holds fixed. B answers of at most T tokens."""

    tokens: Tensor  # [B, T] int64, padded
    mask: Tensor  # [B, T] bool, the tokens of the answer
    old_logprobs: Tensor | None  # [B, T]; None: the policy has not moved yet
    ref_logprobs: Tensor  # [B, T]
    advantages: Tensor  # [B]


def normalizer(batch: Batch) -> float:
    """For the aggregation ``"constant"``: every answer counts as one of the greatest length."""
    return float(len(batch.tokens) * ANSWER_LENGTH)


class Loss(NamedTuple):
    """A loss to call backward on, and what was measured with it."""

    value: Tensor
    logprobs: Tensor  # [B, T], detached: the old ones of the updates that follow
    metrics: dict[str, float]  # kl, entropy, clipped


class Library(NamedTuple):
    """One way to compute it all. ``logits`` are ``[B, T, V]``, row t for token t."""

    name: str
    score: Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits, tokens, mask) -> logprobs [B, T]
    advantages: Callable[[Tensor, int, Scale], Tensor]  # (rewards [B], group_size, scale) -> [B]
    loss: Callable[
        [Tensor, Batch, PolicyLossConfig, float], Loss
    ]  # (logits, batch, config, normalizer)
