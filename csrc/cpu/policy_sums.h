// policy_sums: the metrics of policy_loss, of a sequence and of a batch.
#pragma once

#include <array>

#include "../math/policy_metrics.h"
#include "policy_tokens.h"

namespace pyllmtune {

struct PolicyMetrics : std::array<double, kMetrics> {
  PolicyMetrics() {
    fill(0);
    (*this)[kNegativeRatioMin] = (*this)[kRatioMax] = -std::numeric_limits<double>::infinity();
  }
  void join(const PolicyMetrics& other) {
    for (int slot = 0; slot < kMetricSums; ++slot) (*this)[slot] += other[slot];
    for (int slot = kMetricSums; slot < kMetrics; ++slot)
      (*this)[slot] = std::max((*this)[slot], other[slot]);
  }
};

// What is added up over a sequence: counts as integers, the rest a vector at a time.
template <class V>
struct PolicySums {
  using F = typename V::Scalar;
  int64_t tokens = 0, dropped = 0, below = 0, above = 0, capped = 0;
  V loss{F(0)}, approx_kl{F(0)}, approx_kl_k3{F(0)}, kl_ref{F(0)}, ratio{F(0)}, ratio_squared{F(0)};
  V entropy{F(0)}, weight{F(0)};
  V lowest{std::numeric_limits<F>::infinity()}, highest{-std::numeric_limits<F>::infinity()};

  // own_k3: e^r - 1 - r of the token's own log-ratio
  void add(const PolicyInputs<F>& in, const PolicyTokens<V>& token, V own_k3, V used_ratio,
           const TokenTerms<V>& terms) {
    const V zero(F(0));
    tokens += count(token.valid);
    dropped += count(token.dropped);
    below += count(token.valid & terms.below);
    above += count(token.valid & terms.above);
    capped += count(token.valid & terms.capped);
    loss = loss + select(token.valid, terms.value, zero);
    approx_kl = approx_kl - token.log_ratio;
    approx_kl_k3 = approx_kl_k3 + own_k3;
    const V shown = select(token.valid, used_ratio, zero);
    ratio = ratio + shown;
    ratio_squared = fma_of(shown, shown, ratio_squared);
    lowest = select(token.valid, min_of(used_ratio, lowest), lowest);
    highest = select(token.valid, max_of(used_ratio, highest), highest);
    if (in.ref_logprobs != nullptr) kl_ref = kl_ref + select(token.valid, terms.kl, zero);
    if (in.entropy != nullptr) entropy = entropy + token.entropy;
    if (in.weights != nullptr) weight = weight + token.weight;
  }

  PolicyMetrics metrics(const PolicyInputs<F>& in, F share) const {
    PolicyMetrics out;
    out[kTokens] = tokens;
    out[kSequences] = tokens > 0;
    out[kDropped] = dropped;
    out[kLoss] = reduce_sum(loss) * share;
    out[kClippedLow] = below;
    out[kClippedHigh] = above;
    out[kClippedCap] = capped;
    out[kApproxKl] = reduce_sum(approx_kl);
    out[kApproxKlK3] = reduce_sum(approx_kl_k3);
    out[kKlRef] = reduce_sum(kl_ref);
    out[kRatio] = reduce_sum(ratio);
    out[kRatioSquared] = reduce_sum(ratio_squared);
    out[kEntropy] = reduce_sum(entropy);
    out[kWeight] = in.weights != nullptr ? reduce_sum(weight) : F(tokens);
    out[kNegativeRatioMin] = reduce_max(V(F(0)) - lowest);
    out[kRatioMax] = reduce_max(highest);
    return out;
  }
};

}  // namespace pyllmtune
