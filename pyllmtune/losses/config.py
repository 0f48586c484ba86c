"""PolicyLossConfig: level x rule x KL x aggregation, the one description of every policy loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Level = Literal["token", "sequence", "seq-token", "sequence-sum", "geometric"]
Rule = Literal[
    "ppo",
    "cispo",
    "unclipped",
    "clip",
    "sapo",
    "vespo",
    "dppo-tv",
    "dppo-kl",
    "prime",
    "dro",
    "reinforce",
    "topr",
]
KlEstimator = Literal["none", "k1", "k2", "k3", "abs"]
KlGradient = Literal["plain", "straight-through", "score", "ratio"]
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant", "length-weighted"
]

_CHOICES = {
    "level": Level,
    "rule": Rule,
    "kl": KlEstimator,
    "kl_gradient": KlGradient,
    "aggregation": Aggregation,
}
CONSTANTS = (  # what the kernels get, in this order (csrc/math/policy_rules.h)
    *("rule_a", "rule_b", "rule_c", "rule_d"),
    *("log_ratio_limit", "score_min", "score_max"),
    *("kl_coef", "kl_input_limit", "kl_limit", "entropy_coef"),
)


def code(field: str, name: str) -> int:
    """The integer that stands for ``name`` in the kernels (csrc/math/policy_rules.h): its place in
    the Literal.
    """
    return get_args(_CHOICES[field]).index(name)


@dataclass(frozen=True)
class PolicyLossConfig:
    """What a policy loss computes. With ``r = logprob - old`` the log-ratio, ``s`` what the level
    makes of it, ``w = e^s`` the ratio, ``A`` the advantage, ``d = ref - logprob``, ``sg`` a
    constant of the update (docs/policy_loss.md has every formula with its gradient):

    Attributes:
        level: ``"token"``: ``s = r``. ``"sequence"`` (GSPO): the mean of ``r`` over the sequence,
            with the gradient through that mean. ``"seq-token"`` (GSPO-token): the same value, the
            gradient of the token's own ``r``. ``"sequence-sum"`` (RLOO, VESPO): the sum.
            ``"geometric"`` (GMPO): the mean of ``r`` clipped to ``[-eps_low, eps_high]`` on the
            side that A pushes to; with ``"unclipped"``.
        rule: ``"ppo"``: ``-min(w A, clip(w, 1 - eps_low, 1 + eps_high) A)``. ``"cispo"``:
            ``-sg(clip(w, 1 - eps_low, 1 + eps_high)) A logprob``; absolute bounds ``lo`` and ``hi``
            are ``eps_low = 1 - lo`` and ``eps_high = hi - 1``. ``"unclipped"``: ``-w A``.
            ``"clip"``: ``-clip(w, ...) A``. ``"sapo"``: a soft gate. ``"vespo"``: a gamma weight of
            the sequence. ``"dppo-tv"``, ``"dppo-kl"``: ``-sg(min(w, cap)) A logprob`` while the
            probability has moved by at most ``eps`` in the direction of A. ``"prime"``: ``-w A``
            under the mask of ``"dppo-tv"``. ``"dro"``: ``-(A logprob - dro_beta s^2 / 2)``.
            ``"reinforce"``: ``-A logprob``. ``"topr"``: the same for ``A > 0``, else ``"cispo"``.
        eps_low: lower clip width; 1 means no lower bound.
        eps_high: upper clip width; infinity means no upper bound.
        cap: upper bound of the ratio: of ``"ppo"`` where ``A < 0`` (dual clip; INTELLECT-2's
            delta), of ``"dppo-tv"`` and ``"dppo-kl"`` everywhere.
        sapo_tau: temperatures for ``A > 0`` and for the others.
        vespo_gamma: ``(k, lambda)`` for ``A >= 0``, then for ``A < 0``.
        dro_beta: weight of the quadratic term of ``"dro"``.
        log_ratio_limit: each ``r`` is clamped to at most this in size before the level uses it;
            beyond it there is no gradient.
        score_limits: ``s`` is clamped to these bounds; beyond them there is no gradient.
        kl: estimator of KL(policy || reference): ``k1 = -d``, ``k2 = d^2 / 2``, ``k3 = e^d - d -
            1``, ``abs = |d|``.
        kl_gradient: ``"plain"``: of the estimator. ``"straight-through"``: the one of k2 with the
            value of the estimator. ``"score"``: plus the estimator itself, as if it were multiplied
            by ``e^(logprob - sg(logprob))``. ``"ratio"``: value and gradient of ``w`` times the
            estimator (importance corrected), exact at every level.
        kl_coef: weight of that term; it is added after ``weights`` were applied.
        kl_input_limit: ``d`` is clamped to at most this in size.
        kl_limit: the estimate is clamped to at most this in size.
        entropy_coef: weight of the entropy bonus, which is subtracted.
        aggregation: ``"token-mean"``: sum over all tokens / number of tokens.
            ``"seq-mean-token-mean"``: mean per sequence, then / number of sequences.
            ``"seq-mean-token-sum"``: sum / number of sequences. ``"constant"``: sum / the
            normalizer given with the call (Dr. GRPO). ``"length-weighted"``: sums of sequences
            times their lengths / the normalizer given with the call.

    >>> PolicyLossConfig(rule="cispo", eps_low=1.0, eps_high=4.0).rule
    'cispo'
    >>> PolicyLossConfig(eps_high=-0.2)
    Traceback (most recent call last):
    ...
    ValueError: eps_high must be at least 0, got -0.2; infinity means no upper bound
    """

    level: Level = "token"
    rule: Rule = "ppo"
    eps_low: float = 0.2
    eps_high: float = 0.2
    cap: float | None = None
    sapo_tau: tuple[float, float] = (1.0, 1.05)
    vespo_gamma: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)
    dro_beta: float = 0.0
    log_ratio_limit: float = math.inf
    score_limits: tuple[float, float] = (-math.inf, math.inf)
    kl: KlEstimator = "none"
    kl_gradient: KlGradient = "plain"
    kl_coef: float = 0.0
    kl_input_limit: float = math.inf
    kl_limit: float = math.inf
    entropy_coef: float = 0.0
    aggregation: Aggregation = "token-mean"

    def __post_init__(self) -> None:
        for field, literal in _CHOICES.items():
            value, choices = getattr(self, field), get_args(literal)
            if value not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")
        self._check_rule()
        for field in ("kl_coef", "entropy_coef", "dro_beta"):
            # not math.isfinite, which the compiler of torch 2.11 takes for a node of the graph
            if not abs(getattr(self, field)) < math.inf:
                raise ValueError(f"{field} must be finite, got {getattr(self, field)}")
        for field in ("log_ratio_limit", "kl_input_limit", "kl_limit"):
            if not getattr(self, field) > 0.0:
                raise ValueError(
                    f"{field} must be positive, got {getattr(self, field)}; infinity means none"
                )
        if not self.score_limits[0] < self.score_limits[1]:
            raise ValueError(f"score_limits must be (lower, upper), got {self.score_limits}")
        if self.kl == "none" and self.kl_coef != 0.0:
            raise ValueError(
                f"kl_coef={self.kl_coef} needs an estimator: set kl to k1, k2, k3 or abs"
            )

    def _check_rule(self) -> None:
        if not 0.0 <= self.eps_low <= 1.0:
            raise ValueError(
                f"eps_low must be in [0, 1], got {self.eps_low}; 1 means no lower bound"
            )
        if not self.eps_high >= 0.0:
            raise ValueError(
                f"eps_high must be at least 0, got {self.eps_high}; infinity means no upper bound"
            )
        if self.level == "geometric" and self.rule != "unclipped":
            raise ValueError(
                f"level='geometric' clips log-ratios itself, got rule={self.rule!r}; "
                "set rule='unclipped'"
            )
        if self.cap is not None and self.rule not in ("ppo", "dppo-tv", "dppo-kl"):
            raise ValueError(
                f"cap belongs to rule='ppo', 'dppo-tv' or 'dppo-kl', got rule={self.rule!r}; "
                "leave cap=None"
            )
        least = 1.0 + self.eps_high if self.rule == "ppo" else 0.0
        if self.cap is not None and not self.cap > least:
            raise ValueError(f"cap must be greater than {least}, got {self.cap}")
        if not all(0.0 < tau <= 80.0 for tau in self.sapo_tau):
            raise ValueError(f"sapo_tau must be two numbers in (0, 80], got {self.sapo_tau}")
        if not all(abs(value) < math.inf for value in self.vespo_gamma):
            raise ValueError(f"vespo_gamma must be four finite numbers, got {self.vespo_gamma}")

    @property
    def low(self) -> float:
        """Lower bound of the ratio."""
        return 1.0 - self.eps_low

    @property
    def high(self) -> float:
        """Upper bound of the ratio."""
        return 1.0 + self.eps_high

    @property
    def choices(self) -> list[int]:
        """The codes of level, rule, KL estimator, its gradient and aggregation, for the kernels."""
        return [code(field, getattr(self, field)) for field in _CHOICES]

    @property
    def constants(self) -> list[float]:
        """The numbers of ``CONSTANTS``, for the kernels."""
        cap = math.inf if self.cap is None else self.cap
        rule = {
            "sapo": (*self.sapo_tau, 0.0, 0.0),
            "vespo": self.vespo_gamma,
            "dro": (self.dro_beta, 0.0, 0.0, 0.0),
        }.get(self.rule)
        if rule is None:
            widths = self.level == "geometric" or self.rule in ("dppo-tv", "dppo-kl", "prime")
            bounds = (-self.eps_low, self.eps_high) if widths else (self.low, self.high)
            rule = (*bounds, cap, 0.0)
        return [
            *rule,
            self.log_ratio_limit,
            *self.score_limits,
            self.kl_coef,
            self.kl_input_limit,
            self.kl_limit,
            self.entropy_coef,
        ]

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PolicyLossConfig:
        """The loss of a trainer by its name, ``"trl.grpo"`` for example, with some fields changed;
        ``pyllmtune.losses.presets.PRESETS`` lists them with the divisor that each trainer uses.

        >>> PolicyLossConfig.preset("verl.vanilla").cap
        3.0
        """
        from pyllmtune.losses import presets

        return replace(presets.get(name).config, **changes)
