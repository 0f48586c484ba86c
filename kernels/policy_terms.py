"""What surrounds a rule of policy_loss: loads, level, KL term, weight. csrc/math/policy_terms.h in
Triton, with the same codes, branches and order of operations.
"""

import triton
import triton.language as tl

from .common import INF
from .policy_rules import (
    CLIP,
    DRO,
    PPO,
    PRIME,
    SAPO,
    UNCLIPPED,
    VESPO,
    apply_rule,
    clamp_to,
    product,
)

# the integers that pyllmtune/losses/config.py sends
TOKEN, SEQUENCE, SEQ_TOKEN, SEQUENCE_SUM, GEOMETRIC = (tl.constexpr(level) for level in range(5))
NO_KL, K1, K2, K3, ABS = (tl.constexpr(estimator) for estimator in range(5))
PLAIN, STRAIGHT_THROUGH, SCORE, RATIO_TIMES = (tl.constexpr(mode) for mode in range(4))
TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN, LENGTH_WEIGHTED = (tl.constexpr(code) for code in (0, 1, 4))


@triton.jit
def exp_residual(x, exp_x):
    """e^x - 1 - x; by its series below one half, where the plain expression loses every digit."""
    series = x * (1.0 / 362880) + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    return tl.where((x < 0.5) & (x > -0.5), series * x * x, exp_x - 1.0 - x)


@triton.constexpr_function
def spreads_over_sequence(level, rule, mode):
    """Whether a gradient of the score goes to all tokens of the sequence."""
    moves = rule in (PPO, UNCLIPPED, CLIP, SAPO, PRIME, DRO) or mode == RATIO_TIMES
    return moves and level not in (TOKEN, SEQ_TOKEN)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < INF


@triton.jit
def load_tokens(
    t,
    end,
    sequence,
    logprobs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    ref_ptr,
    entropy_ptr,
    weights_ptr,
    TOKEN_ADVANTAGES: tl.constexpr,
):
    """A block of tokens; 0 where not valid, so that it enters no arithmetic. A token with anything
    that is not finite is dropped.
    """
    selected = t < end
    if mask_ptr is not None:
        selected = selected & (tl.load(mask_ptr + t, mask=selected, other=0) != 0)
    logprob = tl.load(logprobs_ptr + t, mask=selected, other=0.0)
    old = tl.load(old_ptr + t, mask=selected, other=0.0)
    if TOKEN_ADVANTAGES:
        advantage = tl.load(advantages_ptr + t, mask=selected, other=0.0)
    else:
        advantage = tl.zeros_like(old) + tl.load(advantages_ptr + sequence)
    valid = selected & _is_finite(logprob) & _is_finite(old) & _is_finite(advantage)
    ref, entropy, weight = logprob, tl.zeros_like(old), tl.full(old.shape, 1.0, tl.float32)
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + t, mask=selected, other=0.0)
        valid = valid & _is_finite(ref)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + t, mask=selected, other=0.0)
        valid = valid & _is_finite(entropy)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + t, mask=selected, other=0.0)
        valid = valid & _is_finite(weight)
    logprob, old = tl.where(valid, logprob, 0.0), tl.where(valid, old, 0.0)
    return (
        valid,
        selected & ~valid,
        logprob,
        old,
        tl.where(valid, advantage, 0.0),
        tl.where(valid, weight, 0.0),
        tl.where(valid, ref - logprob, 0.0),
        tl.where(valid, entropy, 0.0),
    )


@triton.jit
def level_term(
    log_ratio, advantage, weight, rule_a, rule_b, limit, LEVEL: tl.constexpr, RULE: tl.constexpr
):
    """What one token gives to the score of its level; whether it flows; which bound clipped it."""
    value = clamp_to(log_ratio, 0.0 - limit, limit)
    flows = value == log_ratio
    below, above = log_ratio != log_ratio, log_ratio != log_ratio  # never
    if LEVEL == GEOMETRIC:
        below = (advantage < 0.0) & (value < rule_a)
        above = (advantage >= 0.0) & (value > rule_b)
        value = tl.where(below, rule_a, tl.where(above, rule_b, value))
        flows = flows & ~(below | above)
    if RULE == VESPO:  # the weight is part of the ratio: in [1e-8, e^20]
        value += tl.log(clamp_to(weight, 1e-8, 485165195.4))
    return value, flows, below, above


@triton.jit
def score_of(
    level_value,
    level_flows,
    sequence_score,
    score_min,
    score_max,
    LEVEL: tl.constexpr,
):
    """The score of each token, and whether a bound holds it."""
    raw = level_value
    if LEVEL != TOKEN:
        raw = tl.zeros_like(level_value) + sequence_score
    score = tl.minimum(tl.maximum(raw, score_min), score_max)
    flows = score == raw
    if LEVEL == TOKEN:
        flows = flows & level_flows
    return score, flows


@triton.jit
def kl_term(
    delta,
    ratio,
    score_flows,
    limit,
    bound,
    LEVEL: tl.constexpr,
    KL: tl.constexpr,
    MODE: tl.constexpr,
):
    """Value, d value / d score, d value / d logprob; k3 also where no term is asked."""
    d = clamp_to(delta, 0.0 - limit, limit)
    if KL == K1:
        value = -d
        slope = tl.full(d.shape, 1.0, tl.float32)
    elif KL == K2:
        value = 0.5 * d * d
        slope = -d
    elif KL == ABS:
        value = tl.abs(d)
        slope = tl.where(d < 0.0, 1.0, tl.where(d > 0.0, -1.0, 0.0))
    else:
        value = exp_residual(d, tl.exp(d))
        slope = -(value + d)
    held = clamp_to(value, 0.0 - bound, bound)
    flows = (d == delta) & (held == value)
    slope = tl.where(flows, slope, 0.0)
    d_score = tl.zeros_like(d)
    if MODE == STRAIGHT_THROUGH:
        slope = -delta
    elif MODE != PLAIN:  # e^d cancels in k3
        both = tl.where(flows, -d, held) if (KL == K3) | (KL == NO_KL) else held + slope
        if MODE == SCORE:
            slope = both
        else:
            held = product(ratio, held)
            if (LEVEL == TOKEN) | (LEVEL == SEQ_TOKEN):
                slope = product(ratio, tl.where(score_flows, both, slope))
            else:
                d_score = held
                slope = product(ratio, slope)
    return held, d_score, slope


@triton.jit
def token_terms(
    score,
    score_flows,
    advantage,
    logprob,
    old_logprob,
    weight,
    delta,
    entropy,
    rule_a,
    rule_b,
    rule_c,
    rule_d,
    kl_coef,
    kl_input_limit,
    kl_limit,
    entropy_coef,
    LEVEL: tl.constexpr,
    RULE: tl.constexpr,
    KL: tl.constexpr,
    MODE: tl.constexpr,
):
    """Loss, d loss / d score, d loss / d logprob, estimate of the KL, the three bounds."""
    ratio = tl.exp(score)
    value, d_score, d_logprob, below, above, capped = apply_rule(
        score, ratio, advantage, logprob, old_logprob, rule_a, rule_b, rule_c, rule_d, RULE
    )
    if RULE != VESPO:
        value = product(weight, value)
        d_score = product(weight, d_score)
        d_logprob = product(weight, d_logprob)
    kl, kl_score, kl_slope = kl_term(
        delta, ratio, score_flows, kl_input_limit, kl_limit, LEVEL, KL, MODE
    )
    if KL != NO_KL:
        value += kl_coef * kl
        d_score += kl_coef * kl_score
        d_logprob += kl_coef * kl_slope
    value -= entropy_coef * entropy
    return value, tl.where(score_flows, d_score, 0.0), d_logprob, kl, below, above, capped
