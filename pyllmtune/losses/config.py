"""PolicyLossConfig: level x rule x KL x aggregation, the one description of every policy loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

Level = Literal["token", "sequence"]
Rule = Literal["ppo", "cispo"]
KlEstimator = Literal["none", "k1", "k2", "k3"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]

_CHOICES = {"level": Level, "rule": Rule, "kl": KlEstimator, "aggregation": Aggregation}


def code(field: str, name: str) -> int:
    """The integer that stands for ``name`` in the kernels (csrc/math/policy_rules.h): its place in
    the Literal.
    """
    return get_args(_CHOICES[field]).index(name)


@dataclass(frozen=True)
class PolicyLossConfig:
    """What a policy loss computes. With ``w`` the ratio, ``A`` the advantage, ``d = ref -
    logprob``:

    Attributes:
        level: ``"token"``: ``w = exp(logprob - old)`` per token. ``"sequence"`` (GSPO): the
            exponential of the mean log-ratio of the sequence, with the gradient through that mean.
        rule: ``"ppo"``: ``-min(w A, clip(w, 1 - eps_low, 1 + eps_high) A)``. ``"cispo"``: the
            clipped ratio as a constant weight, ``-sg(clip(w, 1 - eps_low, 1 + eps_high)) A
            logprob``.
        eps_low: lower clip width; 1 means no lower bound.
        eps_high: upper clip width.
        cap: upper bound of the ratio where ``A < 0`` (dual clip; INTELLECT-2's delta). Only with
            ``"ppo"``.
        kl: estimator of KL(policy || reference): ``k1 = -d``, ``k2 = d^2 / 2``, ``k3 = e^d - d -
            1``.
        kl_coef: weight of that term; it is added after ``weights`` were applied.
        entropy_coef: weight of the entropy bonus, which is subtracted.
        aggregation: ``"token-mean"``: sum over all tokens / number of tokens.
            ``"seq-mean-token-mean"``: mean per sequence, then / number of sequences.
            ``"seq-mean-token-sum"``: sum / number of sequences. ``"constant"``: sum / the
            normalizer given with the call (Dr. GRPO).

    >>> PolicyLossConfig(rule="cispo", eps_low=1.0, eps_high=4.0).rule
    'cispo'
    >>> PolicyLossConfig(eps_high=-0.2)
    Traceback (most recent call last):
    ...
    ValueError: eps_high must be at least 0 and finite, got -0.2
    """

    level: Level = "token"
    rule: Rule = "ppo"
    eps_low: float = 0.2
    eps_high: float = 0.2
    cap: float | None = None
    kl: KlEstimator = "none"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    aggregation: Aggregation = "token-mean"

    def __post_init__(self) -> None:
        for field, literal in _CHOICES.items():
            value, choices = getattr(self, field), get_args(literal)
            if value not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")
        if not 0.0 <= self.eps_low <= 1.0:
            raise ValueError(
                f"eps_low must be in [0, 1], got {self.eps_low}; 1 means no lower bound"
            )
        if not (self.eps_high >= 0.0 and math.isfinite(self.eps_high)):
            raise ValueError(f"eps_high must be at least 0 and finite, got {self.eps_high}")
        if self.cap is not None and self.rule != "ppo":
            raise ValueError(f"cap belongs to rule='ppo', got rule={self.rule!r}; leave cap=None")
        if self.cap is not None and not self.cap > 1.0 + self.eps_high:
            raise ValueError(
                f"cap must be greater than 1 + eps_high = {1.0 + self.eps_high}, got {self.cap}"
            )
        for field in ("kl_coef", "entropy_coef"):
            if not math.isfinite(getattr(self, field)):
                raise ValueError(f"{field} must be finite, got {getattr(self, field)}")
        if self.kl == "none" and self.kl_coef != 0.0:
            raise ValueError(f"kl_coef={self.kl_coef} needs an estimator: set kl to k1, k2 or k3")

    @property
    def low(self) -> float:
        """Lower bound of the ratio."""
        return 1.0 - self.eps_low

    @property
    def high(self) -> float:
        """Upper bound of the ratio."""
        return 1.0 + self.eps_high

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all fields, for command lines and error messages."""
        return tuple(field.name for field in fields(cls))
