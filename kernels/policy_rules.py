"""The clipped objectives and the KL estimators on tiles of tokens: csrc/math/policy_rules.h in
Triton, with the same codes, branches and order of operations.
"""

import triton
import triton.language as tl

# the integers that pyllmtune/losses/config.py sends
SEQUENCE_LEVEL = tl.constexpr(1)
CISPO = tl.constexpr(1)
NO_KL, K1, K2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN = tl.constexpr(0), tl.constexpr(1)


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


@triton.jit
def apply_rule(ratio, advantage, logprob, low, high, cap, RULE: tl.constexpr):
    """Loss, d loss / d log-ratio, d loss / d logprob; which bound was active: low, high, cap."""
    if RULE == CISPO:
        below = ratio < low
        above = ratio > high
        capped = ratio < ratio  # never
        d_log_ratio = tl.zeros_like(ratio)
        d_logprob = 0.0 - tl.where(below, low, tl.where(above, high, ratio)) * advantage
        # a token of probability 0 with advantage 0 is no loss, not 0 * inf
        value = tl.where(advantage == 0.0, 0.0, d_logprob * logprob)
    else:
        negative = advantage < 0.0
        below = negative & (ratio < low)
        above = (advantage >= 0.0) & (ratio > high)
        capped = negative & (ratio > cap)
        effective = tl.where(below, low, tl.where(above, high, tl.where(capped, cap, ratio)))
        value = 0.0 - effective * advantage
        d_log_ratio = tl.where(below | above | capped, 0.0, value)
        d_logprob = tl.zeros_like(ratio)
    return value, d_log_ratio, d_logprob, below, above, capped


@triton.jit
def kl_estimate(delta, KL: tl.constexpr):
    """Value and d value / d logprob, with delta = ref - logprob; k3 also where no term is asked."""
    if KL == K1:
        value = -delta
        d_logprob = tl.full(delta.shape, 1.0, tl.float32)
    elif KL == K2:
        value = 0.5 * delta * delta
        d_logprob = -delta
    else:
        value = exp_residual(delta, tl.exp(delta))
        d_logprob = -(value + delta)
    return value, d_logprob
