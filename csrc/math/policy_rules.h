// policy_rules: the rules of policy_loss, one token at a time. Shared by cpp and cuda; the Triton
// kernel mirrors them and is tested against them.
//
// A rule maps the log-weight s (with ratio = e^s), the advantage A and the log-prob lp to a loss
// value and its two derivatives: dl/ds, which flows through the ratio (and so through the level),
// and dl/dlp at fixed s. Three shapes cover all of them:
//   ratio_rule     -e A       e is the ratio, or the bound that stopped it
//   weighted_rule  -u A lp    u is a constant of the update, made of the ratio
//   sapo, dro      on their own
// The integers and the constants are the ones that pyllmtune/losses/config.py sends.
#pragma once

#include "numeric.h"

namespace pyllmtune {

enum Rule : int {
  kPpo,
  kCispo,
  kUnclipped,
  kClip,
  kSapo,
  kVespo,
  kDppoTv,
  kDppoKl,
  kPrime,
  kDro,
  kReinforce,
  kTopr
};

template <class F>
using Compared = decltype(F(0.0f) < F(0.0f));

template <class F>
struct RuleInput {
  F score, ratio, advantage, logprob, old_logprob;  // ratio = e^score
};

template <class F>
struct RuleResult {
  F value, d_score, d_logprob;
  Compared<F> below, above, capped;  // which bound was active
};

// a b, and 0 where one of them is 0: an advantage or a weight of 0 silences an infinite ratio.
template <class F>
PLT_HD F product(F a, F b) {
  const F zero(0.0f);
  return select((a == zero) | (b == zero), zero, a * b);
}

template <class F>
PLT_HD F clamp_to(F x, F low, F high) {
  return select(x < low, low, select(x > high, high, x));
}

template <class F>
PLT_HD RuleResult<F> ratio_rule(F effective, F advantage, Compared<F> below, Compared<F> above,
                                Compared<F> capped) {
  const F zero(0.0f);
  const F value = zero - product(effective, advantage);
  return {value, select(below | above | capped, zero, value), zero, below, above, capped};
}

template <class F>
PLT_HD RuleResult<F> weighted_rule(F weight, const RuleInput<F>& in, Compared<F> below,
                                   Compared<F> above, Compared<F> capped) {
  const F zero(0.0f);
  const F d_logprob = zero - product(weight, in.advantage);
  return {product(d_logprob, in.logprob), zero, d_logprob, below, above, capped};
}

// 4/tau sigmoid(tau (w - 1)) in place of the ratio, tau by the sign of A: at w = 1 value and slope
// are those of -w A, and far from it the slope is 0.
template <class F>
PLT_HD RuleResult<F> sapo(const RuleInput<F>& in, F tau_positive, F tau_other) {
  const F zero(0.0f), one(1.0f), four(4.0f);
  const Compared<F> never = in.ratio < in.ratio;
  const F tau = select(in.advantage > zero, tau_positive, tau_other);
  const F e = exp_of(tau * (one - in.ratio));
  const F gate = one / (one + e), closed = e / (one + e);
  const F slope = product(four * gate * closed, in.ratio);  // closed is 0 for an infinite ratio
  return {zero - product(four * gate / tau, in.advantage),
          zero - product(slope, in.advantage),
          zero,
          never,
          never,
          never};
}

// VESPO: the ratio of a sequence reshaped as w^k e^(lambda (1 - w)), 1 at w = 1.
template <class F>
PLT_HD F vespo_weight(const RuleInput<F>& in, F k_positive, F lambda_positive, F k_negative,
                      F lambda_negative) {
  const auto negative = in.advantage < F(0.0f);
  const F k = select(negative, k_negative, k_positive);
  const F lambda = select(negative, lambda_negative, lambda_positive);
  return exp_of(lambda + k * in.score - lambda * in.ratio);
}

// DPPO: how far the probability of the token has moved, signed: the total variation p - p_old, or
// the divergence between the two Bernoulli distributions. 1e-8 keeps the logarithm finite.
template <class F>
PLT_HD F probability_moved(bool divergence, const RuleInput<F>& in) {
  const F zero(0.0f), one(1.0f), tiny(1e-8f);
  const F p = exp_of(in.logprob), p_old = exp_of(in.old_logprob);
  const F moved = p - p_old;
  if (!divergence) return moved;
  const F rest = max_of(one - p, zero), rest_old = max_of(one - p_old, zero);
  const F kl =
      p_old * (in.old_logprob - in.logprob) + rest_old * log_of((rest_old + tiny) / (rest + tiny));
  return select(moved < zero, zero - kl, select(moved > zero, kl, zero));
}

template <class F, class Number>
PLT_HD RuleResult<F> apply_rule(int rule, const Number* constants, const RuleInput<F>& in) {
  const F zero(0.0f), one(1.0f);
  const F low(constants[0]), high(constants[1]), cap(constants[2]), last(constants[3]);
  const Compared<F> never = in.ratio<in.ratio, positive = in.advantage> zero;
  const Compared<F> small = in.ratio<low, large = in.ratio> high;
  const F clipped = select(small, low, select(large, high, in.ratio));
  switch (rule) {
    case kPpo: {  // for A > 0 only `high` can bind, for A < 0 only `low` and `cap`
      const Compared<F> negative = in.advantage < zero;
      const Compared<F> below = negative & small, above = positive & large;
      const Compared<F> capped = negative & (in.ratio > cap);
      const F effective = select(below, low, select(above, high, select(capped, cap, in.ratio)));
      return ratio_rule(effective, in.advantage, below, above, capped);
    }
    case kClip:
      return ratio_rule(clipped, in.advantage, small, large, never);
    case kUnclipped:
      return ratio_rule(in.ratio, in.advantage, never, never, never);
    case kSapo:
      return sapo(in, low, high);
    case kDro: {  // -(A lp - beta/2 s^2)
      const F slope = low * in.score;
      return {F(0.5f) * slope * in.score - in.advantage * in.logprob,
              slope,
              zero - in.advantage,
              never,
              never,
              never};
    }
    case kCispo:
      return weighted_rule(clipped, in, small, large, never);
    case kTopr:
      return weighted_rule(select(positive, one, clipped), in, !positive & small, !positive & large,
                           never);
    case kReinforce:
      return weighted_rule(one, in, never, never, never);
    case kVespo:
      return weighted_rule(vespo_weight(in, low, high, cap, last), in, never, never, never);
    default: {  // kDppoTv, kDppoKl, kPrime: nothing, once the probability moved too far along A
      const F moved = probability_moved(rule == kDppoKl, in);
      const Compared<F> below = !positive & (moved < low), above = positive & (moved > high);
      if (rule == kPrime)
        return ratio_rule(select(below | above, zero, in.ratio), in.advantage, below, above, never);
      const Compared<F> capped = in.ratio > cap;
      const F weight = select(below | above, zero, select(capped, cap, in.ratio));
      return weighted_rule(weight, in, below, above, capped);
    }
  }
}

}  // namespace pyllmtune
