// policy_loss: clipped policy objective, KL penalty and entropy bonus, with their gradient and
// metrics, in one pass.
//
//   loss = scale * sum_i a_i sum_t [ weight * rule(ratio, A) + kl_coef * k(ref - lp) - entropy_coef
//   * H ] Per-token arrays are flat [total]; sequence i is offsets[i]:offsets[i + 1]. a_i is 1 or
//   1/n_i, scale is 1/normalizer. grad_logprobs, grad_entropy [total]: d (loss / scale); scale is
//   known last, so backward multiplies by it. Reads 9 to 25 bytes a token and writes 4 or 8. What
//   needs the whole sequence first (n_i, the mean log-ratio) takes a pass of its own over data that
//   is then in cache. Threads take whole sequences; sums are kept in double and added in order, so
//   nothing depends on their number.
#include <torch/csrc/stable/library.h>

#include <array>
#include <vector>

#include "../math/policy_rules.h"
#include "parallel.h"
#include "sequences.h"
#include "types.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

// the order of pyllmtune/losses/metrics.py
enum Slot {
  kTokens,
  kSequences,
  kDropped,
  kLoss,
  kClippedLow,
  kClippedHigh,
  kClippedCap,
  kApproxKl,
  kApproxKlK3,
  kKlRef,
  kRatio,
  kRatioSquared,
  kEntropy,
  kWeight,
  kSums,
  kNegativeRatioMin = kSums,
  kRatioMax,
  kSlots
};
using Metrics = std::array<double, kSlots>;

template <class F>
struct Inputs {
  const F *logprobs, *old_logprobs, *advantages;
  const bool* mask;                           // or null
  const F *ref_logprobs, *entropy, *weights;  // or null
  const int64_t* offsets;
  bool token_advantages;
  int level, rule, kl, aggregation;
  F low, high, cap, kl_coef, entropy_coef;
};

// One vector of tokens; what is not valid is 0 in every field.
template <class V>
struct Tokens {
  V logprob, log_ratio;
  MaskOf<V> valid, dropped;
};

template <class V>
Tokens<V> load_tokens(const Inputs<typename V::Scalar>& in, int64_t t, int64_t n) {
  const V zero(0);
  MaskOf<V> selected = lanes_up_to<V>(n);
  if (in.mask != nullptr) selected = selected & load_mask_up_to<V>(in.mask + t, n);
  const V old = load_up_to<V>(in.old_logprobs + t, n, 0);
  MaskOf<V> finite = (old - old) == zero;
  if (in.ref_logprobs != nullptr) {
    const V ref = load_up_to<V>(in.ref_logprobs + t, n, 0);
    finite = finite & ((ref - ref) == zero);
  }
  Tokens<V> out;
  out.valid = selected & finite;
  out.dropped = selected & !finite;
  out.logprob = select(out.valid, load_up_to<V>(in.logprobs + t, n, 0), zero);
  out.log_ratio = out.logprob - select(out.valid, old, zero);
  return out;
}

template <class F>
struct SequenceStats {
  F count, log_ratio;  // valid tokens, sum of their log-ratios
};

template <class V>
SequenceStats<typename V::Scalar> sequence_stats(const Inputs<typename V::Scalar>& in,
                                                 int64_t begin, int64_t end) {
  V count(0), log_ratio(0);
  for (int64_t t = begin; t < end; t += V::kWidth) {
    const Tokens<V> tokens = load_tokens<V>(in, t, end - t);
    count = count + select(tokens.valid, V(1), V(0));
    log_ratio = log_ratio + tokens.log_ratio;
  }
  return {reduce_sum(count), reduce_sum(log_ratio)};
}

// What is added up over a sequence: counts as integers, the rest a vector at a time.
template <class V>
struct Sums {
  using F = typename V::Scalar;
  int64_t tokens = 0, dropped = 0, below = 0, above = 0, capped = 0;
  V loss{F(0)}, approx_kl{F(0)}, approx_kl_k3{F(0)}, kl_ref{F(0)}, ratio{F(0)}, ratio_squared{F(0)};
  V entropy{F(0)}, weight{F(0)};
  V lowest{std::numeric_limits<F>::infinity()}, highest{-std::numeric_limits<F>::infinity()};

  void add(const Tokens<V>& token, V token_ratio, V used_ratio, const RuleResult<V>& rule) {
    tokens += count(token.valid);
    dropped += count(token.dropped);
    below += count(token.valid & rule.below);
    above += count(token.valid & rule.above);
    capped += count(token.valid & rule.capped);
    approx_kl = approx_kl - token.log_ratio;
    approx_kl_k3 = approx_kl_k3 + exp_residual(token.log_ratio, token_ratio);
    const V shown = select(token.valid, used_ratio, V(F(0)));
    ratio = ratio + shown;
    ratio_squared = fma_of(shown, shown, ratio_squared);
    lowest = select(token.valid & (used_ratio < lowest), used_ratio, lowest);
    highest = select(token.valid & (used_ratio > highest), used_ratio, highest);
  }

  Metrics metrics(F share, bool weighted) const {
    Metrics out;
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
    out[kWeight] = weighted ? reduce_sum(weight) : tokens;
    out[kNegativeRatioMin] = reduce_max(V(F(0)) - lowest);
    out[kRatioMax] = reduce_max(highest);
    return out;
  }
};

// The mean log-ratio hands its gradient to every valid token alike.
template <class V>
void spread_over_sequence(const Inputs<typename V::Scalar>& in, int64_t begin, int64_t end,
                          typename V::Scalar part, typename V::Scalar* grad_logprobs) {
  for (int64_t t = begin; t < end; t += V::kWidth) {
    const V add = select(load_tokens<V>(in, t, end - t).valid, V(part), V(0));
    store_up_to(grad_logprobs + t, load_up_to<V>(grad_logprobs + t, end - t, 0) + add, end - t);
  }
}

template <class V>
Metrics sequence_loss(const Inputs<typename V::Scalar>& in, int64_t sequence,
                      typename V::Scalar* grad_logprobs, typename V::Scalar* grad_entropy) {
  using F = typename V::Scalar;
  const int64_t begin = in.offsets[sequence], end = in.offsets[sequence + 1];
  const V zero(0), low(in.low), high(in.high), cap(in.cap);
  const bool by_sequence = in.level == kSequenceLevel;

  F per_token = 1, mean_log_ratio = 0;
  if (by_sequence || in.aggregation == kSeqMeanTokenMean) {
    const auto stats = sequence_stats<V>(in, begin, end);
    per_token = F(1) / (stats.count > F(1) ? stats.count : F(1));
    mean_log_ratio = stats.log_ratio * per_token;
  }
  const F share = in.aggregation == kSeqMeanTokenMean ? per_token : F(1);  // a_i
  const V sequence_ratio = exp_of(V(mean_log_ratio));

  Sums<V> sums;
  V through_mean = zero;  // d loss / d mean log-ratio, summed over the sequence
  for (int64_t t = begin; t < end; t += V::kWidth) {
    const int64_t n = end - t;
    const Tokens<V> tokens = load_tokens<V>(in, t, n);
    const auto valid = tokens.valid;
    auto values = [&](const F* x) { return select(valid, load_up_to<V>(x + t, n, 0), zero); };
    const V advantage = in.token_advantages ? values(in.advantages)
                                            : select(valid, V(in.advantages[sequence]), zero);
    const V token_ratio = exp_of(tokens.log_ratio);
    const V ratio = by_sequence ? sequence_ratio : token_ratio;
    auto rule = apply_rule(in.rule, ratio, advantage, tokens.logprob, low, high, cap);
    if (in.weights != nullptr) {  // 0 selects: it switches off an infinite loss, too
      const V weight = values(in.weights);
      const auto on = valid & !(weight == zero);
      rule.value = select(on, weight * rule.value, zero);
      rule.d_log_ratio = select(on, weight * rule.d_log_ratio, zero);
      rule.d_logprob = select(on, weight * rule.d_logprob, zero);
      sums.weight = sums.weight + weight;
    }
    sums.add(tokens, token_ratio, ratio, rule);
    V loss = rule.value, grad = rule.d_logprob;
    if (by_sequence)
      through_mean = through_mean + select(valid, rule.d_log_ratio, zero);
    else
      grad = grad + rule.d_log_ratio;
    if (in.ref_logprobs != nullptr) {
      const V delta = values(in.ref_logprobs) - tokens.logprob;
      const auto kl = kl_estimate(in.kl == kNoKl ? kK3 : in.kl, delta);
      sums.kl_ref = sums.kl_ref + select(valid, kl.value, zero);
      if (in.kl != kNoKl && in.kl_coef != F(0)) {
        loss = loss + V(in.kl_coef) * kl.value;
        grad = grad + V(in.kl_coef) * kl.d_logprob;
      }
    }
    if (in.entropy != nullptr) {
      const V entropy = values(in.entropy);
      loss = loss - V(in.entropy_coef) * entropy;
      sums.entropy = sums.entropy + entropy;
      store_up_to(grad_entropy + t, select(valid, V(-in.entropy_coef * share), zero), n);
    }
    sums.loss = sums.loss + select(valid, loss, zero);
    store_up_to(grad_logprobs + t, select(valid, grad * V(share), zero), n);
  }
  if (by_sequence)
    spread_over_sequence<V>(in, begin, end, reduce_sum(through_mean) * per_token * share,
                            grad_logprobs);
  return sums.metrics(share, in.weights != nullptr);
}

template <class F>
Metrics batch_loss(const Inputs<F>& in, int64_t sequences, F* grad_logprobs, F* grad_entropy) {
  using V = typename VectorOf<F>::type;
  std::vector<Metrics> parts(sequences);
  const int64_t total = in.offsets[sequences];
  parallel_for(sequences, sequence_grain(sequences, total), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts[i] = sequence_loss<V>(in, i, grad_logprobs, grad_entropy);
  });
  Metrics all{};
  all[kNegativeRatioMin] = all[kRatioMax] = -std::numeric_limits<double>::infinity();
  for (const Metrics& part : parts) {
    for (int slot = 0; slot < kSums; ++slot) all[slot] += part[slot];
    for (int slot = kSums; slot < kSlots; ++slot)
      all[slot] = part[slot] > all[slot] ? part[slot] : all[slot];
  }
  return all;
}

double scale_of(const Metrics& metrics, int aggregation, double normalizer,
                const double* device_normalizer) {
  if (metrics[kTokens] == 0) return 0;  // loss 0 and gradient 0, whatever the divisor
  if (device_normalizer != nullptr) return 1 / *device_normalizer;
  if (normalizer != 0) return 1 / normalizer;
  return 1 / (aggregation == kTokenMean ? metrics[kTokens] : metrics[kSequences]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
    bool token_advantages, const Tensor& offsets, std::optional<Tensor> mask,
    std::optional<Tensor> ref_logprobs, std::optional<Tensor> entropy,
    std::optional<Tensor> weights, double normalizer, std::optional<Tensor> device_normalizer,
    int64_t level, int64_t rule, int64_t kl, int64_t aggregation, double low, double high,
    double cap, double kl_coef, double entropy_coef) {
  const int64_t total = logprobs.numel(), sequences = offsets.numel() - 1;
  const auto dtype = logprobs.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "logprobs must be float32 or float64");
  STD_TORCH_CHECK(kl == kNoKl || ref_logprobs, "a KL term needs ref_logprobs");
  auto run = [&](auto element) {
    using F = decltype(element);
    auto flat = [&](const Tensor& x, const char* name, int64_t numel) {
      check_flat(x, numel, dtype, name);
      return data<const F>(x);
    };
    auto optional = [&](const std::optional<Tensor>& x, const char* name) {
      return x ? flat(*x, name, total) : nullptr;
    };
    if (mask) check_flat(*mask, total, ScalarType::Bool, "mask");
    const Inputs<F> in{flat(logprobs, "logprobs", total),
                       flat(old_logprobs, "old_logprobs", total),
                       flat(advantages, "advantages", token_advantages ? total : sequences),
                       mask ? data<const bool>(*mask) : nullptr,
                       optional(ref_logprobs, "ref_logprobs"),
                       optional(entropy, "entropy"),
                       optional(weights, "weights"),
                       check_offsets(offsets, total),
                       token_advantages,
                       static_cast<int>(level),
                       static_cast<int>(rule),
                       static_cast<int>(kl),
                       static_cast<int>(aggregation),
                       F(low),
                       F(high),
                       F(cap),
                       F(kl_coef),
                       F(entropy_coef)};
    const double given = device_normalizer ? *flat(*device_normalizer, "normalizer", 1) : 0;
    Tensor loss = torch::stable::new_empty(logprobs, {}, dtype);
    Tensor scale = torch::stable::new_empty(logprobs, {}, dtype);
    Tensor metrics = torch::stable::new_empty(logprobs, {kSlots}, ScalarType::Double);
    Tensor grad_logprobs = torch::stable::new_empty(logprobs, {total}, dtype);
    Tensor grad_entropy = torch::stable::new_empty(logprobs, {entropy ? total : 0}, dtype);
    const Metrics sums = batch_loss(in, sequences, data<F>(grad_logprobs), data<F>(grad_entropy));
    const double factor =
        scale_of(sums, in.aggregation, normalizer, device_normalizer ? &given : nullptr);
    *data<F>(scale) = F(factor);
    *data<F>(loss) = F(sums[kTokens] == 0 ? 0 : sums[kLoss] * factor);
    std::copy(sums.begin(), sums.end(), data<double>(metrics));
    return std::make_tuple(loss, metrics, grad_logprobs, grad_entropy, scale);
  };
  return dtype == ScalarType::Double ? run(double()) : run(float());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) { m.impl("policy_loss", TORCH_BOX(&policy_loss)); }

}  // namespace pyllmtune
