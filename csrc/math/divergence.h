// divergence: Kullback-Leibler and Jensen-Shannon divergence of two rows of logits, without
// cancellation where the rows are nearly equal.
//
//   p = softmax(z/T), q = softmax(z'/T);  w = e^((z - top)/T), w' = e^((z' - top')/T), and
//   v = log(w'/w), which is 0 where both rows have their maximum in one token
//   S = sum w, S' = sum w', M = sum w v, R = sum (w' - w - w v), with terms of 0 or more
//
//   log(S'/S) = log(1 + x),  x = (M + R)/S;   d = log(q/p) = v - log(S'/S)
//   KL(p || q) = log(S'/S) - M/S = R/S - (x - log(1 + x))
//
// In the last form everything is of the order of v^2: KL = 1e-8 keeps its digits in float32. (The
// plain form leaves 1e-7 of the logarithms' rounding.) One read of each row gives all of it.
//
// -inf adds nothing to the sums of its row; NaN and +inf make a sum NaN.
#pragma once

#include "numeric.h"

namespace pyllmtune {

constexpr double kBitsPerNat = 1.4426950408889634;  // log2 e

// v T of a token, (r - ref_base) - (z - base), in the order that rounds least: r - z is exact where
// the rows are close, and each difference near its base where one row is offset or scaled.
template <class V>
struct LogitGap {
  V base, ref_base, offset;

  template <class F>
  PLT_HD LogitGap(F z_base, F r_base) : base(F(0)), ref_base(F(0)), offset(r_base - z_base) {
    if (r_base - z_base < F(1) && z_base - r_base < F(1)) return;
    base = V(z_base);
    ref_base = V(r_base);
    offset = V(F(0));
  }
  PLT_HD V operator()(V z, V r) const { return (r - ref_base) - (z - base) - offset; }
};

// Of some tokens; F may be a vector, that is one sum for each lane.
template <class F>
struct PairSums {
  F sum = F(0), ref_sum = F(0), moment = F(0), residual = F(0);
  F lowest = F(std::numeric_limits<float>::infinity());  // v; -inf if q forbids what p allows

  PLT_HD void add(F w, F ref_w, F v) {
    const F weighted = select(w > F(0), w * v, F(0));  // 0 * -inf is NaN
    const auto small = (v < F(0.5f)) & (v > F(-0.5f));
    residual = residual + select(small, w * small_exp_residual(v), ref_w - w - weighted);
    moment = moment + weighted;
    sum = sum + w;
    ref_sum = ref_sum + ref_w;
    lowest = min_of(v, lowest);  // drops the NaN of a token that neither row allows
  }
};

template <class F>
struct PairStats {
  F top = -std::numeric_limits<F>::infinity();
  F ref_top = -std::numeric_limits<F>::infinity();
  PairSums<F> sums;

  // Makes `new_top` and `new_ref_top`, which are `top` and `ref_top` or more, the references: w, w'
  // are multiplied by constants, and v is shifted by the difference of their logarithms.
  PLT_HD void rebase(F new_top, F new_ref_top, F inv_temperature) {
    const F none = -std::numeric_limits<F>::infinity();
    const bool empty = top == none, ref_empty = ref_top == none;  // sums of 0, or NaN: keep them
    const F scale = exp_of(empty ? F(0) : (top - new_top) * inv_temperature);
    const F ref_scale = exp_of(ref_empty ? F(0) : (ref_top - new_ref_top) * inv_temperature);
    const F shift = empty | ref_empty
                        ? F(0)
                        : LogitGap<F>(new_top, new_ref_top)(top, ref_top) * inv_temperature;
    const PairSums<F> old = sums;
    sums.sum = scale * old.sum;
    sums.ref_sum = ref_scale * old.ref_sum;
    sums.moment = scale > F(0) ? scale * (old.moment + shift * old.sum) : F(0);
    if (!empty & !ref_empty & (shift < F(0.5)) & (shift > F(-0.5))) {
      const F change = small_exp_residual(shift), growth = shift + change;  // e^shift - 1
      sums.residual =
          scale * (change * old.sum + growth * old.moment + (F(1) + growth) * old.residual);
    } else {
      sums.residual = sums.ref_sum - sums.sum - sums.moment;
    }
    top = new_top;
    ref_top = new_ref_top;
  }
};

template <class F>
PLT_HD PairStats<F> merge(PairStats<F> a, PairStats<F> b, F inv_temperature) {
  const F top = max_of(a.top, b.top), ref_top = max_of(a.ref_top, b.ref_top);
  a.rebase(top, ref_top, inv_temperature);
  b.rebase(top, ref_top, inv_temperature);
  a.sums.sum += b.sums.sum;
  a.sums.ref_sum += b.sums.ref_sum;
  a.sums.moment += b.sums.moment;
  a.sums.residual += b.sums.residual;
  a.sums.lowest = min_of(a.sums.lowest, b.sums.lowest);
  return a;
}

// What backward and a second read need of a row. `top` is -inf in a row without a gradient: it has
// nothing to compare, or is infinite for any finite logits.
template <class F>
struct PairRow {
  F top, log_sum, ref_top, log_ratio;  // log S, log(S'/S)
  F divergence;                        // KL(p || q); of a mixture what it is without a second read

  PLT_HD bool is_open() const { return top != -std::numeric_limits<F>::infinity(); }
};

// With `mixture`, of Jensen-Shannon, tokens that q alone forbids are nothing special.
template <class F>
PLT_HD PairRow<F> finish(const PairStats<F>& row, bool mixture) {
  const F inf = std::numeric_limits<F>::infinity(), nan = std::numeric_limits<F>::quiet_NaN();
  const PairSums<F>& s = row.sums;
  if (s.sum != s.sum || s.ref_sum != s.ref_sum) return {nan, nan, nan, nan, nan};
  if (s.sum == F(0) || (mixture && s.ref_sum == F(0))) return {-inf, F(0), -inf, F(0), F(0)};
  if (!mixture && s.lowest == -inf) return {-inf, F(0), -inf, F(0), inf};
  const F mean = s.moment / s.sum, spread = max_of(s.residual, F(0)) / s.sum;
  PairRow<F> out{row.top, log_of(s.sum), row.ref_top, F(0), F(0)};
  if (spread < F(0.25) && s.lowest > -inf) {  // then |mean| is below 0.9
    const F x = mean + spread, rest = log_residual(x);
    out.log_ratio = x - rest;
    out.divergence = spread - rest;
  } else {
    out.log_ratio = log_of(s.ref_sum / s.sum);
    out.divergence = out.log_ratio - mean;
  }
  if (out.divergence < F(0)) out.divergence = F(0);  // rounding
  return out;
}

// What turns the logits of a row into log2 p, log2 q and d = log(q/p); V is F or a vector of F.
template <class V>
struct RowLogs {
  V base, ref_base, bits, nats, log_sum, ref_log_sum, log_ratio;
  LogitGap<V> gap;

  template <class F>
  PLT_HD RowLogs(const PairRow<F>& row, F inv_temperature)
      : base(row.top),
        ref_base(row.ref_top),
        bits(inv_temperature * F(kBitsPerNat)),
        nats(inv_temperature),
        log_sum(row.log_sum * F(kBitsPerNat)),
        ref_log_sum((row.log_sum + row.log_ratio) * F(kBitsPerNat)),
        log_ratio(row.log_ratio),
        gap(row.top, row.ref_top) {}

  PLT_HD V log2_p(V z) const { return (z - base) * bits - log_sum; }
  PLT_HD V log2_q(V r) const { return (r - ref_base) * bits - ref_log_sum; }
  PLT_HD V d(V z, V r) const { return gap(z, r) * nats - log_ratio; }
};

// dKL/d(z/T) and dKL/d(z'/T) of one token, given its p, q and d = log(q/p).
template <class V>
PLT_HD V kl_gradient(V p, V d, V divergence) {
  return select(p == V(0.0f), V(0.0f), p * (V(0.0f) - d - divergence));  // p = 0: d may be inf
}
template <class V>
PLT_HD V kl_ref_gradient(V p, V q, V d) {
  const auto small = (d < V(0.5f)) & (d > V(-0.5f));  // there q - p = p (e^d - 1)
  return select(small, p * (d + small_exp_residual(d)), q - p);
}

// A token of the mixture m = (1 - W) p + W q: p, q, log(m/p), log(m/q), and the terms of
//   KL(p || m) = sum_j (m - p - p log(p/m)), KL(q || m) alike, which are 0 or more.
// Computed from the larger of p and q, `high`, and t = low/high = e^-gap.
template <class V>
struct Mixed {
  V p, q, log_m_p, log_m_q, p_term, q_term;

  // exp2(y) is 2^y, and 0 for y = -inf or far below
  template <class Exp2>
  PLT_HD Mixed(const RowLogs<V>& row, V z, V r, V weight, const Exp2& exp2) {
    const V one(1.0f), d = row.d(z, r), other = one - weight;
    const auto q_high = d > V(0.0f);
    // 10,000: beyond any exponent, but finite, and in place of the NaN of a token nobody allows
    const V minus_bits = max_of(max_of(V(0.0f) - d, d) * V(-kBitsPerNat), V(-10000.0f));
    const V gap = minus_bits * V(-1 / kBitsPerNat);
    const V t = exp2(minus_bits), high = exp2(max_of(row.log2_p(z), row.log2_q(r))), low = high * t;
    const V weight_high = select(q_high, weight, other), weight_low = select(q_high, other, weight);

    const auto small = gap < V(0.5f);
    const V x = weight_low * select(small, small_exp_residual(V(0.0f) - gap) - gap, t - one);
    const V y = weight_high * (gap + small_exp_residual(gap));  // m/high = 1 + x, m/low = 1 + y
    const V high_term = log_residual(x), log_high = x - high_term, log_low = log_high + gap;
    const V rest = select(small, t * y, x + one - t) - t * log_low;
    const V low_term = select(gap < V(0.125f), t * small_log_residual(y), rest);
    p = select(q_high, low, high);
    q = select(q_high, high, low);
    log_m_p = select(q_high, log_low, log_high);
    log_m_q = select(q_high, log_high, log_low);
    p_term = high * select(q_high, low_term, high_term);
    q_term = high * select(q_high, high_term, low_term);
  }
};

}  // namespace pyllmtune
