"""The rules of policy_loss on tiles of tokens: csrc/math/policy_rules.h in Triton, with the same
codes, branches and order of operations.
"""

import triton
import triton.language as tl

# the integers that pyllmtune/losses/config.py sends
PPO, CISPO, UNCLIPPED, CLIP, SAPO, VESPO, DPPO_TV, DPPO_KL, PRIME, DRO, REINFORCE, TOPR = (
    tl.constexpr(rule) for rule in range(12)
)


@triton.jit
def product(a, b):
    """a b, and 0 where one of them is 0: 0 silences an infinite ratio."""
    return tl.where((a == 0.0) | (b == 0.0), 0.0, a * b)


@triton.jit
def clamp_to(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _vespo_weight(score, ratio, advantage, k, rate, k_negative, rate_negative):
    """The ratio of a sequence reshaped as w^k e^(rate (1 - w)), 1 at w = 1."""
    k = tl.where(advantage < 0.0, k_negative, k)
    rate = tl.where(advantage < 0.0, rate_negative, rate)
    return tl.exp(rate + k * score - rate * ratio)


@triton.jit
def _probability_moved(logprob, old_logprob, DIVERGENCE: tl.constexpr):
    """How far the probability of the token has moved, signed: total variation or Bernoulli KL."""
    p, p_old = tl.exp(logprob), tl.exp(old_logprob)
    moved = p - p_old
    if DIVERGENCE:
        rest, rest_old = tl.maximum(1.0 - p, 0.0), tl.maximum(1.0 - p_old, 0.0)
        other = rest_old * tl.log((rest_old + 1e-8) / (rest + 1e-8))
        kl = p_old * (old_logprob - logprob) + other
        moved = tl.where(moved < 0.0, -kl, tl.where(moved > 0.0, kl, 0.0))
    return moved


@triton.jit
def apply_rule(score, ratio, advantage, logprob, old_logprob, a, b, c, d, RULE: tl.constexpr):
    """Loss, d loss / d score, d loss / d logprob; which bound was active: low, high, cap."""
    never = ratio < ratio
    positive = advantage > 0.0
    below, above, capped = never, never, never
    through_ratio: tl.constexpr = (
        (RULE == PPO) | (RULE == CLIP) | (RULE == UNCLIPPED) | (RULE == PRIME)
    )
    factor = ratio  # of -A, or of -A logprob
    if RULE == PPO:
        negative = advantage < 0.0
        below = negative & (ratio < a)
        above = positive & (ratio > b)
        capped = negative & (ratio > c)
        factor = tl.where(below, a, tl.where(above, b, tl.where(capped, c, ratio)))
    elif (RULE == CLIP) | (RULE == CISPO):
        below, above = ratio < a, ratio > b
        factor = clamp_to(ratio, a, b)
    elif RULE == TOPR:
        below, above = (ratio < a) & ~positive, (ratio > b) & ~positive
        factor = tl.where(positive, 1.0, clamp_to(ratio, a, b))
    elif RULE == REINFORCE:
        factor = tl.full(ratio.shape, 1.0, tl.float32)
    elif RULE == VESPO:
        factor = _vespo_weight(score, ratio, advantage, a, b, c, d)
    elif (RULE == DPPO_TV) | (RULE == DPPO_KL) | (RULE == PRIME):
        moved = _probability_moved(logprob, old_logprob, RULE == DPPO_KL)
        below, above = (moved < a) & ~positive, (moved > b) & positive
        if RULE != PRIME:
            capped = ratio > c
            factor = tl.where(capped, c, ratio)
        factor = tl.where(below | above, 0.0, factor)

    if through_ratio:
        value = 0.0 - product(factor, advantage)
        d_score = tl.where(below | above | capped, 0.0, value)
        d_logprob = tl.zeros_like(ratio)
    elif RULE == SAPO:
        tau = tl.where(positive, a, b)
        e = tl.exp(tau * (1.0 - ratio))
        gate, closed = 1.0 / (1.0 + e), e / (1.0 + e)
        value = 0.0 - product(4.0 * gate / tau, advantage)
        d_score = 0.0 - product(product(4.0 * gate * closed, ratio), advantage)
        d_logprob = tl.zeros_like(ratio)
    elif RULE == DRO:
        d_score = a * score
        value = 0.5 * d_score * score - advantage * logprob
        d_logprob = 0.0 - advantage
    else:
        d_logprob = 0.0 - product(factor, advantage)
        value = product(d_logprob, logprob)
        d_score = tl.zeros_like(ratio)
    return value, d_score, d_logprob, below, above, capped
