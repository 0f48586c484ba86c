// online_softmax: what one read of a row of logits leaves behind, and how two parts of a row are
// joined.
//
//   max      largest logit z                          (not divided by the temperature)
//   sum      S = sum_j e^(d_j),      d_j = (z_j - max) / T
//   weighted W = sum_j e^(d_j) d_j   relative to the maximum, so that a large common offset cancels
//   nothing
//
//   log p_y = (z_y - max)/T - log S,   H = log S - W / S,   logsumexp = max/T + log S
//
// -inf logits add nothing. A NaN or +inf logit makes S NaN, and with it every result of that row
// and of no other.
#pragma once

#include "numeric.h"

namespace pyllmtune {

template <class F>
struct SoftmaxStats {
  F max = -std::numeric_limits<F>::infinity();
  F sum = F(0);
  F weighted = F(0);
};

template <class F>
struct TokenScore {
  F logprob, entropy, logsumexp, log_sum;
};

template <class F>
PLT_HD SoftmaxStats<F> merge(SoftmaxStats<F> a, SoftmaxStats<F> b, F inv_temperature) {
  const F none = -std::numeric_limits<F>::infinity();
  SoftmaxStats<F> out;
  out.max = a.max > b.max ? a.max : b.max;
  // a part without any allowed logit has S = W = 0 (or NaN, which must survive): shift it by
  // nothing
  const F shift_a = a.max == none ? F(0) : (a.max - out.max) * inv_temperature;
  const F shift_b = b.max == none ? F(0) : (b.max - out.max) * inv_temperature;
  const F scale_a = exp_of(shift_a), scale_b = exp_of(shift_b);
  // a shift below the underflow of exp is finite in F, but (-huge) * 0 is fine while (-inf) * 0 is
  // not
  out.sum = a.sum * scale_a + b.sum * scale_b;
  out.weighted = scale_a * a.weighted + scale_b * b.weighted;
  if (scale_a > F(0)) out.weighted += scale_a * shift_a * a.sum;
  if (scale_b > F(0)) out.weighted += scale_b * shift_b * b.sum;
  return out;
}

template <class F>
PLT_HD TokenScore<F> finish(SoftmaxStats<F> row, F target_logit, F inv_temperature) {
  const F none = -std::numeric_limits<F>::infinity();
  if (row.max == none && row.sum == F(0)) return {none, F(0), none, F(0)};  // nothing is allowed
  TokenScore<F> out;
  out.log_sum = log_of(row.sum);
  const F logprob = (target_logit - row.max) * inv_temperature - out.log_sum;
  const F entropy = out.log_sum - row.weighted / row.sum;
  out.logprob =
      logprob > F(0) ? F(0) : logprob;  // a log-probability; rounding may not lift it above 0
  out.entropy = entropy < F(0) ? F(0) : entropy;
  out.logsumexp = row.max * inv_temperature + out.log_sum;
  return out;
}

// dz_j = (1/T) [ g (1[j = y] - p_j) - h p_j (log p_j + H) + q p_j ], as p_j (constant + slope log
// p_j) + 1[j = y] at_target.
template <class F>
struct ScoreGradient {
  F constant, slope, at_target;

  PLT_HD bool is_zero() const { return constant == F(0) && slope == F(0) && at_target == F(0); }
};

template <class F>
PLT_HD ScoreGradient<F> score_gradient(F grad_logprob, F grad_entropy, F grad_logsumexp, F entropy,
                                       F inv_temperature) {
  return {(grad_logsumexp - grad_logprob - grad_entropy * entropy) * inv_temperature,
          -grad_entropy * inv_temperature, grad_logprob * inv_temperature};
}

}  // namespace pyllmtune
