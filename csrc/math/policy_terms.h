// policy_terms: what surrounds a rule of policy_loss at one token: the level that makes the
// log-weight s of the log-ratios, the KL term, the weight and the entropy bonus. Shared by cpp and
// cuda; the Triton kernel mirrors them.
#pragma once

#include "policy_rules.h"

namespace pyllmtune {

enum Level : int { kToken, kSequence, kSeqToken, kSequenceSum, kGeometric };
enum KlEstimator : int { kNoKl, kK1, kK2, kK3, kAbs };
enum KlGradient : int { kPlain, kStraightThrough, kScore, kRatioTimes };
enum Aggregation : int {
  kTokenMean,
  kSeqMeanTokenMean,
  kSeqMeanTokenSum,
  kConstant,
  kLengthWeighted
};

// In the order of PolicyLossConfig.choices.
struct PolicyChoices {
  int level, rule, kl, kl_gradient, aggregation;
  // whether a limit can be finite; a kernel compiled for fewer cases says so in a derived type
  static constexpr bool kLimited = true;

  PLT_HD bool by_sequence() const { return level != kToken; }
  // whether a gradient of s goes to all tokens of the sequence
  PLT_HD bool spreads() const {
    const bool moves = rule == kPpo || rule == kUnclipped || rule == kClip || rule == kSapo ||
                       rule == kPrime || rule == kDro || kl_gradient == kRatioTimes;
    return moves && level != kToken && level != kSeqToken;
  }
  PLT_HD bool sums() const { return level == kSequenceSum; }
  PLT_HD bool needs_count() const {
    return by_sequence() || aggregation == kSeqMeanTokenMean || aggregation == kLengthWeighted;
  }
};

// In the order of PolicyLossConfig.constants.
template <class Number>
struct PolicyConstants {
  Number rule[4];
  Number log_ratio_limit, score_min, score_max;
  Number kl_coef, kl_input_limit, kl_limit, entropy_coef;
};
constexpr int kPolicyChoices = 5, kPolicyConstants = 11;

// `numbers` as they come from Python.
template <class Number, class Numbers>
PolicyConstants<Number> policy_constants(const Numbers& numbers) {
  const auto at = [&](int i) { return static_cast<Number>(numbers[i]); };
  return {{at(0), at(1), at(2), at(3)}, at(4), at(5), at(6), at(7), at(8), at(9), at(10)};
}
template <class Numbers>
PolicyChoices policy_choices(const Numbers& numbers) {
  const auto at = [&](int i) { return static_cast<int>(numbers[i]); };
  return {at(0), at(1), at(2), at(3), at(4)};
}

// What one token gives to the log-weight of its level; where it does not flow, a bound holds it.
template <class F>
struct LevelTerm {
  F value;
  Compared<F> flows, below, above;
};

template <class F, class Choices, class Number>
PLT_HD LevelTerm<F> level_term(const Choices& choose, const PolicyConstants<Number>& c, F log_ratio,
                               F advantage, F weight) {
  const F limit(c.log_ratio_limit);
  LevelTerm<F> out;
  out.value = Choices::kLimited ? clamp_to(log_ratio, F(0.0f) - limit, limit) : log_ratio;
  out.flows = out.value == log_ratio;
  out.below = out.above = limit < limit;  // never
  if (choose.level == kGeometric) {       // GMPO: clipped on the side that A pushes to
    const F low(c.rule[0]), high(c.rule[1]);
    const auto negative = advantage < F(0.0f);
    out.below = negative & (out.value < low);
    out.above = !negative & (out.value > high);
    out.value = select(out.below, low, select(out.above, high, out.value));
    out.flows = out.flows & !(out.below | out.above);
  }
  if (choose.rule == kVespo)  // the weight is part of the ratio: in [1e-8, e^20]
    out.value =
        out.value + log_of(clamp_to(weight, F(Number(1e-8)), F(Number(485165195.40979028))));
  return out;
}

template <class F>
struct KlTerm {
  F value, d_score, d_logprob;
};

// An estimator of KL(pi || ref), d = ref - lp (http://joschu.net/blog/kl-approx.html), with the
// asked gradient. k3 also where no term is asked: it is measured then.
template <class F, class Choices, class Number>
PLT_HD KlTerm<F> kl_term(const Choices& choose, const PolicyConstants<Number>& c, F delta, F ratio,
                         Compared<F> score_flows) {
  const F zero(0.0f), limit(c.kl_input_limit), bound(c.kl_limit);
  const F d = Choices::kLimited ? clamp_to(delta, zero - limit, limit) : delta;
  F value, slope;  // slope: d value / d lp
  if (choose.kl == kK1) {
    value = zero - d, slope = F(1.0f);
  } else if (choose.kl == kK2) {
    value = F(0.5f) * d * d, slope = zero - d;
  } else if (choose.kl == kAbs) {
    value = select(d < zero, zero - d, d);
    slope = select(d < zero, F(1.0f), select(d > zero, F(-1.0f), zero));
  } else {
    value = exp_pair(d).residual, slope = zero - (value + d);
  }
  F held = value;
  Compared<F> flows = d == delta;
  if constexpr (Choices::kLimited) {
    held = clamp_to(value, zero - bound, bound);
    flows = flows & (held == value);
    slope = select(flows, slope, zero);
  }
  if (choose.kl_gradient == kPlain) return {held, zero, slope};
  if (choose.kl_gradient == kStraightThrough) return {held, zero, zero - delta};
  // d (x value) / d lp at x = 1, where x moves with lp; e^d cancels in k3
  const bool cancels = choose.kl == kK3 || choose.kl == kNoKl;
  const F both = cancels ? select(flows, zero - d, held) : held + slope;
  if (choose.kl_gradient == kScore) return {held, zero, both};
  if (choose.spreads()) return {product(ratio, held), product(ratio, held), product(ratio, slope)};
  return {product(ratio, held), zero, product(ratio, select(score_flows, both, slope))};
}

template <class F>
struct TokenInput {
  F score, ratio, advantage, logprob, old_logprob, weight, delta, entropy;
  Compared<F> score_flows;  // s is not held by a bound
};

template <class F>
struct TokenTerms {
  F value, d_score, d_logprob, kl;
  Compared<F> below, above, capped;
};

// Loss of one valid token and its gradient.
template <class F, class Choices, class Number>
PLT_HD TokenTerms<F> token_terms(const Choices& choose, const PolicyConstants<Number>& c,
                                 const TokenInput<F>& in, bool has_reference, bool has_weights) {
  const F zero(0.0f);
  const RuleResult<F> rule =
      apply_rule(choose.rule, c.rule,
                 RuleInput<F>{in.score, in.ratio, in.advantage, in.logprob, in.old_logprob});
  TokenTerms<F> out{rule.value, rule.d_score, rule.d_logprob, zero,
                    rule.below, rule.above,   rule.capped};
  if (has_weights && choose.rule != kVespo) {
    out.value = product(in.weight, out.value);
    out.d_score = product(in.weight, out.d_score);
    out.d_logprob = product(in.weight, out.d_logprob);
  }
  if (has_reference) {
    const KlTerm<F> kl = kl_term(choose, c, in.delta, in.ratio, in.score_flows);
    out.kl = kl.value;
    if (choose.kl != kNoKl && c.kl_coef != Number(0)) {
      out.value = out.value + F(c.kl_coef) * kl.value;
      out.d_score = out.d_score + F(c.kl_coef) * kl.d_score;
      out.d_logprob = out.d_logprob + F(c.kl_coef) * kl.d_logprob;
    }
  }
  out.value = out.value - F(c.entropy_coef) * in.entropy;
  out.d_score = select(in.score_flows, out.d_score, zero);
  return out;
}

}  // namespace pyllmtune
