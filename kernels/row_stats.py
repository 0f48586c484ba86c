"""row_stats: maximum, sum and weighted sum of a row of logits, and what follows from them
(csrc/math/online_softmax.h has the formulas).

A row is folded into lanes; a lane keeps its own (top, total, weighted), weighted with its exponents
in bits, so nothing crosses threads before the row ends.
"""

from __future__ import annotations

import triton.language as tl

from .common import INF, LN2, LOG2E, LOWEST_EXPONENT, device_function


@device_function
def shift_to(new_top, top, bits_per_logit):
    """Exponent, in bits, that moves sums relative to ``top`` to the higher ``new_top``."""
    return tl.where(
        new_top > top, tl.maximum((top - new_top) * bits_per_logit, LOWEST_EXPONENT), 0.0
    )


@device_function
def fold(top, total, weighted, z, bits_per_logit):
    """The statistics ``[LANES]`` with ``z [LANES, n]`` added to them."""
    new_top = tl.maximum(top, tl.max(z, 1))
    shift = shift_to(new_top, top, bits_per_logit)
    scale = tl.exp2(shift)
    # tl.max drops a NaN, but NaN - base is NaN and stays in total; +inf becomes inf - inf
    base = tl.where(new_top == -INF, 0.0, new_top)
    exponent = (z - base[:, None]) * bits_per_logit
    e = tl.exp2(exponent)
    weighted = scale * (weighted + shift * total)
    weighted += tl.sum(e * tl.maximum(exponent, LOWEST_EXPONENT), 1)
    return new_top, total * scale + tl.sum(e, 1), weighted


@device_function
def join_lanes(top, total, weighted, bits_per_logit):
    """(max, sum, weighted) of the row, weighted in nats."""
    row_top = tl.max(top, 0)
    shift = shift_to(row_top, top, bits_per_logit)
    scale = tl.exp2(shift)
    row_weighted = tl.sum(scale * (weighted + shift * total), 0) * LN2
    return row_top, tl.sum(scale * total, 0), row_weighted


@device_function
def finish(top, total, weighted, target, inv_temperature):
    """log-prob, entropy, logsumexp and log sum."""
    nothing_allowed = (top == -INF) & (total == 0.0)
    log_sum = tl.where(nothing_allowed, 0.0, tl.log(total))
    logprob = (target - top) * inv_temperature - log_sum
    logprob = tl.where(logprob > 0.0, 0.0, logprob)  # rounding may not lift it above 0
    entropy = log_sum - weighted / total
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    logprob = tl.where(nothing_allowed, -INF, logprob)
    entropy = tl.where(nothing_allowed, 0.0, entropy)
    return logprob, entropy, top * inv_temperature + log_sum, log_sum


@device_function
def gradient(z, top, log_sum, inv_temperature, constant, slope_per_bit):
    """p (constant + slope log p)."""
    log2_p = (z - top) * (inv_temperature * LOG2E) - log_sum * LOG2E
    return tl.exp2(log2_p) * (constant + slope_per_bit * tl.maximum(log2_p, LOWEST_EXPONENT))
