// policy_rules: the clipped objectives and the KL estimators, one token at a time. Shared by cpp
// and cuda; the Triton kernel mirrors them and is tested against them.
//
// A rule maps (log-ratio s as ratio = e^s, advantage A, log-prob lp) to a loss value and its two
// derivatives: dl/ds, which flows through the ratio (and, at sequence level, through the mean over
// the sequence), and dl/dlp at fixed s. The integers are the ones that pyllmtune/losses/config.py
// sends.
#pragma once

#include "numeric.h"

namespace pyllmtune {

enum Level : int { kTokenLevel = 0, kSequenceLevel = 1 };
enum Rule : int { kPpoClip = 0, kCispo = 1 };
enum KlEstimator : int { kNoKl = 0, kK1 = 1, kK2 = 2, kK3 = 3 };
enum Aggregation : int {
  kTokenMean = 0,
  kSeqMeanTokenMean = 1,
  kSeqMeanTokenSum = 2,
  kConstant = 3
};

template <class F>
struct RuleResult {
  using Mask = decltype(F(0.0f) < F(0.0f));
  F value, d_log_ratio, d_logprob;
  Mask below, above, capped;  // which bound was active
};

template <class F>
struct KlResult {
  F value, d_logprob;
};

// l = -min(w A, clip(w, low, high) A), and for A < 0 at most -cap A (dual clip, Ye et al. 2020;
// "delta" of INTELLECT-2). For A >= 0 only `high` can bind, for A < 0 only `low` and `cap`; where
// one binds the gradient is 0.
template <class F>
PLT_HD RuleResult<F> ppo_clip(F ratio, F advantage, F low, F high, F cap) {
  const F zero(0.0f);
  RuleResult<F> out;
  const auto negative = advantage < zero;
  const auto positive = advantage >= zero;
  out.below = negative & (ratio < low);
  out.above = positive & (ratio > high);
  out.capped = negative & (ratio > cap);
  const F effective =
      select(out.below, low, select(out.above, high, select(out.capped, cap, ratio)));
  out.value = zero - effective * advantage;
  out.d_log_ratio = select(out.below | out.above | out.capped, zero, out.value);
  out.d_logprob = zero;
  return out;
}

// CISPO (MiniMax-M1): l = -sg(clip(w, low, high)) A lp. The weight is a constant, every token keeps
// a gradient.
template <class F>
PLT_HD RuleResult<F> cispo(F ratio, F advantage, F logprob, F low, F high) {
  const F zero(0.0f);
  RuleResult<F> out;
  out.below = ratio < low;
  out.above = ratio > high;
  out.capped = ratio < ratio;  // never
  const F weight = select(out.below, low, select(out.above, high, ratio));
  out.d_log_ratio = zero;
  out.d_logprob = zero - weight * advantage;
  // a token of probability 0 with advantage 0 is no loss, not 0 * inf
  out.value = select(advantage == zero, zero, out.d_logprob * logprob);
  return out;
}

template <class F>
PLT_HD RuleResult<F> apply_rule(int rule, F ratio, F advantage, F logprob, F low, F high, F cap) {
  return rule == kCispo ? cispo(ratio, advantage, logprob, low, high)
                        : ppo_clip(ratio, advantage, low, high, cap);
}

// Schulman's estimators of KL(pi || ref) with d = ref - lp (http://joschu.net/blog/kl-approx.html)
// and d value / d lp.
template <class F>
PLT_HD KlResult<F> kl_estimate(int estimator, F delta) {
  const F zero(0.0f);
  if (estimator == kK1) return {zero - delta, F(1.0f)};
  if (estimator == kK2) return {F(0.5f) * delta * delta, zero - delta};
  const F residual = exp_residual(delta, exp_of(delta));  // k3 = e^d - 1 - d
  return {residual, zero - (residual + delta)};
}

}  // namespace pyllmtune
