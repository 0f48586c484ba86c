"""The pieces of policy_loss, the specification: level, rule and KL term on flat tokens.

Everything is ``[total]``; gradients are autograd's. What a bound stops, or a weight or an advantage
of 0 silences, leaves the graph before ``exp``: an overflowed ratio has no gradient there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyllmtune.losses.config import code

PerSequence = Callable[[Tensor], Tensor]  # the sum over its sequence at every token: [total]


class Score(NamedTuple):
    """The log of the ratio, and the tokens whose own log-ratio the level clipped."""

    value: Tensor
    below: Tensor
    above: Tensor


def level_score(
    level: int,
    rule: int,
    constants: dict[str, float],
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    valid: Tensor,
    sequence_sum: PerSequence,
) -> Score:
    """What the level makes of the log-ratios; for ``"vespo"`` with the weights folded in."""
    limit = constants["log_ratio_limit"]
    log_ratio = (logprobs - old).clamp(-limit, limit)
    if rule == code("rule", "vespo"):
        log_ratio = log_ratio + torch.where(valid, weights.clamp(1e-8, math.exp(20.0)).log(), 0)
    below = above = torch.zeros_like(valid)
    count = sequence_sum(valid.to(logprobs.dtype)).clamp(min=1)
    if level == code("level", "token"):
        score = log_ratio
    elif level == code("level", "sequence"):
        score = sequence_sum(log_ratio) / count
    elif level == code("level", "seq-token"):
        score = logprobs - logprobs.detach() + (sequence_sum(log_ratio) / count).detach()
    elif level == code("level", "sequence-sum"):
        score = sequence_sum(log_ratio)
    else:
        low, high = constants["rule_a"], constants["rule_b"]
        below, above = (advantages < 0) & (log_ratio < low), (advantages >= 0) & (log_ratio > high)
        clipped = log_ratio.masked_fill(below, low).masked_fill(above, high)
        score = sequence_sum(torch.where(valid, clipped, 0)) / count
    return Score(score.clamp(constants["score_min"], constants["score_max"]), below, above)


class RuleValue(NamedTuple):
    """The loss of each token, and which bound was active."""

    value: Tensor
    below: Tensor
    above: Tensor
    capped: Tensor


def apply_rule(
    rule: int,
    constants: dict[str, float],
    score: Tensor,
    advantages: Tensor,
    logprobs: Tensor,
    old: Tensor,
    silent: Tensor,
) -> RuleValue:
    """The policy term without its weight; 0 where ``silent``."""
    first, second, third, fourth = (constants[f"rule_{name}"] for name in "abcd")
    ratio = score.detach().exp()
    negative, never = advantages < 0, torch.zeros_like(silent)
    below = above = capped = never

    def name(*names: str) -> bool:
        return rule in [code("rule", known) for known in names]

    if name("ppo"):
        below, above = negative & (ratio < first), (advantages > 0) & (ratio > second)
        capped = negative & (ratio > third)
    elif name("cispo", "clip", "topr"):
        below, above = ratio < first, ratio > second
        if name("topr"):
            below, above = below & ~(advantages > 0), above & ~(advantages > 0)
    elif name("dppo-tv", "dppo-kl", "prime"):
        below, above = _moved_too_far(rule, first, second, advantages, logprobs, old)
        if not name("prime"):
            capped = ratio > third

    if name("ppo", "unclipped", "clip", "prime", "sapo"):  # the gradient flows through the ratio
        stopped = silent | below | above | capped | (ratio.isinf() & name("sapo"))
        effective = torch.where(stopped, 0, score).exp()
        if name("ppo", "clip"):
            effective = effective.masked_fill(below, first).masked_fill(above, second)
            effective = effective.masked_fill(capped, third)
        elif name("prime"):
            effective = effective.masked_fill(below | above, 0)
        elif name("sapo"):
            tau = torch.full_like(score, second).masked_fill(advantages > 0, first)
            gate = torch.sigmoid(tau * (effective - 1))
            effective = torch.where(ratio.isinf(), 1, gate) * 4 / tau
        value = -effective * advantages
    elif name("dro"):
        value = -(advantages * logprobs - first / 2 * score**2)
    else:  # a constant times A logprob
        if name("cispo"):
            factor = ratio.clamp(first, second)
        elif name("topr"):
            factor = torch.where(advantages > 0, 1, ratio.clamp(first, second))
        elif name("vespo"):
            k = torch.full_like(ratio, first).masked_fill(negative, third)
            rate = torch.full_like(ratio, second).masked_fill(negative, fourth)
            factor = (rate + k * score.detach() - rate * ratio).exp()
        elif name("reinforce"):
            factor = torch.ones_like(ratio)
        else:
            factor = torch.where(below | above, 0, ratio.clamp(max=third))
        value = -factor * torch.where(silent, 0, advantages * logprobs)
    return RuleValue(torch.where(silent, 0, value), below, above, capped)


def _moved_too_far(
    rule: int, low: float, high: float, advantages: Tensor, logprobs: Tensor, old: Tensor
) -> tuple[Tensor, Tensor]:
    """DPPO: the probability left the trust region in the direction that the advantage pushes to."""
    p, p_old = logprobs.detach().exp(), old.exp()
    moved = p - p_old
    if rule == code("rule", "dppo-kl"):
        tiny = 1e-8
        rest, rest_old = (1 - p).clamp(min=0), (1 - p_old).clamp(min=0)
        other = rest_old * ((rest_old + tiny) / (rest + tiny)).log()
        divergence = p_old * (old - logprobs.detach()) + other
        moved = torch.where(moved < 0, -divergence, torch.where(moved > 0, divergence, 0))
    positive = advantages > 0
    return ~positive & (moved < low), positive & (moved > high)


def kl_term(
    estimator: int,
    gradient: int,
    constants: dict[str, float],
    logprobs: Tensor,
    delta: Tensor,
    score: Tensor,
) -> Tensor:
    """The estimate per token with the asked gradient, without its coefficient."""
    limit, bound = constants["kl_input_limit"], constants["kl_limit"]
    d = delta.clamp(-limit, limit)
    value = {
        code("kl", "k1"): lambda: -d,
        code("kl", "k2"): lambda: d**2 / 2,
        code("kl", "abs"): lambda: d.abs(),
    }.get(estimator, lambda: torch.expm1(d) - d)()  # k3 is also measured where no term is asked
    value = value.clamp(-bound, bound)
    if gradient == code("kl_gradient", "straight-through"):
        squared = delta**2 / 2
        return value.detach() + (squared - squared.detach())
    if gradient == code("kl_gradient", "score"):
        return (logprobs - logprobs.detach()).exp() * value
    if gradient == code("kl_gradient", "ratio"):
        return score.exp() * value
    return value
