"""csrc/math/divergence.h in Triton: the same formulas in the same order."""

import triton.language as tl

from .common import INF, LN2, LOG2E, device_function


@device_function
def _small_exp_residual(x):
    """e^x - 1 - x below one half."""
    series = x * (1.0 / 362880) + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    return series * x * x


@device_function
def _small_log_residual(x):
    """x - log(1 + x) below 1/7."""
    series = x * (1.0 / 10) - 1.0 / 9
    series = series * x + 1.0 / 8
    series = series * x - 1.0 / 7
    series = series * x + 1.0 / 6
    series = series * x - 1.0 / 5
    series = series * x + 1.0 / 4
    series = series * x - 1.0 / 3
    series = series * x + 0.5
    return series * x * x


@device_function
def _log_residual(x):
    """x - log(1 + x), x > -1."""
    small = (x < 0.125) & (x > -0.125)
    return tl.where(small, _small_log_residual(x), x - tl.log2(1.0 + x) * LN2)


@device_function
def logit_gap(z, r, base, ref_base):
    """(r - ref_base) - (z - base); r - z is exact where the rows are close."""
    close = tl.abs(ref_base - base) < 1.0
    apart = (r - ref_base) - (z - base)
    return tl.where(close, (r - z) - (ref_base - base), apart)


@device_function
def pair_terms(w, ref_w, v):
    """w v, and w' - w - w v, of each token."""
    weighted = tl.where(w > 0.0, w * v, 0.0)
    small = (v < 0.5) & (v > -0.5)
    residual = w * _small_exp_residual(tl.where(small, v, 0.0))
    return weighted, tl.where(small, residual, ref_w - w - weighted)


@device_function
def rebase(
    top, ref_top, total, ref_total, moment, residual, new_top, new_ref_top, inverse_temperature
):
    """The sums relative to maxima that have grown."""
    empty = top == -INF
    ref_empty = ref_top == -INF
    scale = tl.exp(tl.where(empty, 0.0, (top - new_top) * inverse_temperature))
    ref_scale = tl.exp(tl.where(ref_empty, 0.0, (ref_top - new_ref_top) * inverse_temperature))
    shift = logit_gap(top, ref_top, new_top, new_ref_top) * inverse_temperature
    shift = tl.where(empty | ref_empty, 0.0, shift)
    new_total = scale * total
    new_ref_total = ref_scale * ref_total
    new_moment = tl.where(scale > 0.0, scale * (moment + shift * total), 0.0)
    small = (shift < 0.5) & (shift > -0.5)
    change = _small_exp_residual(tl.where(small, shift, 0.0))
    growth = shift + change  # e^shift - 1
    near = scale * (change * total + growth * moment + (1.0 + growth) * residual)
    far = new_ref_total - new_total - new_moment
    new_residual = tl.where(small & ((empty | ref_empty) == 0), near, far)
    return new_total, new_ref_total, new_moment, new_residual


@device_function
def row_divergence(top, ref_top, total, ref_total, moment, residual, lowest, MIXTURE: tl.constexpr):
    """top, log S, ref_top, log(S'/S) and KL(p || q) of a row, as ``finish`` in C++."""
    nan = float("nan")
    invalid = (total != total) | (ref_total != ref_total)
    closed = total == 0.0
    if MIXTURE:
        closed = closed | (ref_total == 0.0)
        infinite = closed
        constant = 0.0
    else:
        infinite = lowest == -INF
        constant = tl.where(closed, 0.0, INF)
    closed = closed | infinite
    plain = (invalid | closed) == 0
    safe_total = tl.where(plain, total, 1.0)
    mean = tl.where(plain, moment, 0.0) / safe_total
    spread = tl.maximum(tl.where(plain, residual, 0.0), 0.0) / safe_total
    near = (spread < 0.25) & (lowest > -INF)
    x = tl.where(near, mean + spread, 0.0)
    rest = _log_residual(x)
    far_ratio = tl.log(tl.where(plain, ref_total, 1.0) / safe_total)
    log_ratio = tl.where(near, x - rest, far_ratio)
    value = tl.maximum(tl.where(near, spread - rest, log_ratio - mean), 0.0)
    log_sum = tl.log(safe_total)
    top = tl.where(invalid, nan, tl.where(closed, -INF, top))
    ref_top = tl.where(invalid, nan, tl.where(closed, -INF, ref_top))
    log_sum = tl.where(invalid, nan, log_sum)
    log_ratio = tl.where(invalid, nan, log_ratio)
    value = tl.where(invalid, nan, tl.where(closed, constant, value))
    return top, log_sum, ref_top, log_ratio, value


@device_function
def kl_gradient(p, d, divergence):
    """dKL/d(z/T)."""
    return tl.where(p == 0.0, 0.0, p * (0.0 - d - divergence))


@device_function
def kl_ref_gradient(p, q, d):
    """dKL/d(z'/T)."""
    small = (d < 0.5) & (d > -0.5)
    return tl.where(small, p * (d + _small_exp_residual(tl.where(small, d, 0.0))), q - p)


@device_function
def mixed_token(z, r, top, log_sum, ref_top, log_ratio, inverse_temperature, weight):
    """p, q, log(m/p), log(m/q) and the terms of KL(p || m) and KL(q || m), as ``Mixed`` in C++."""
    bits = inverse_temperature * LOG2E
    log2_p = (z - top) * bits - log_sum * LOG2E
    log2_q = (r - ref_top) * bits - (log_sum + log_ratio) * LOG2E
    d = logit_gap(z, r, top, ref_top) * inverse_temperature - log_ratio
    q_high = d > 0.0
    # beyond any exponent, but finite; in place of the NaN of a token that nobody allows
    minus_bits = tl.maximum(tl.where(d == d, -tl.abs(d) * LOG2E, -10000.0), -10000.0)
    gap = -minus_bits * LN2
    t = tl.exp2(minus_bits)
    high = tl.exp2(tl.maximum(log2_p, log2_q, propagate_nan=tl.PropagateNan.ALL))
    low = high * t
    weight_high = tl.where(q_high, weight, 1.0 - weight)
    weight_low = tl.where(q_high, 1.0 - weight, weight)

    small = gap < 0.5
    close = tl.where(small, gap, 0.0)
    x = weight_low * tl.where(small, _small_exp_residual(-close) - close, t - 1.0)
    y = weight_high * (close + _small_exp_residual(close))  # m/high = 1 + x, m/low = 1 + y
    high_term = _log_residual(x)
    log_high = x - high_term
    log_low = log_high + gap
    rest = tl.where(small, t * y, x + 1.0 - t) - t * log_low
    low_term = tl.where(gap < 0.125, t * _small_log_residual(y), rest)
    p = tl.where(q_high, low, high)
    q = tl.where(q_high, high, low)
    log_m_p = tl.where(q_high, log_low, log_high)
    log_m_q = tl.where(q_high, log_high, log_low)
    p_term = high * tl.where(q_high, low_term, high_term)
    q_term = high * tl.where(q_high, high_term, low_term)
    return p, q, log_m_p, log_m_q, p_term, q_term
