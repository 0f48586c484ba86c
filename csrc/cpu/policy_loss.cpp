// policy_loss: clipped policy objective, KL penalty and entropy bonus, with their gradient and
// metrics, in one pass.
//
//   loss = scale * sum_i a_i sum_t [ weight * rule(ratio, A) + kl_coef * k(ref - lp)
//                                    - entropy_coef * H ]
//   Per-token arrays are flat [total]; sequence i is offsets[i]:offsets[i + 1]. a_i is 1, 1/n_i or
//   n_i, scale is 1/normalizer. grad_logprobs, grad_entropy [total]: d (loss / scale); scale is
//   known last, so backward multiplies by it.
//   Reads 9 to 25 bytes a token and writes 4 or 8. What needs the whole sequence first (n_i, the
//   mean log-ratio) takes a pass of its own over data that is then in cache. Threads take whole
//   sequences; sums are kept in double and added in order, so nothing depends on their number.
#include <torch/csrc/stable/library.h>

#include <array>
#include <vector>

#include "../math/policy_terms.h"
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
  PolicyChoices choose;
  PolicyConstants<F> constants;
};

// One vector of tokens; what is not valid is 0 in every field.
template <class V>
struct Tokens {
  V logprob, old_logprob, log_ratio, advantage, weight, delta, entropy;
  MaskOf<V> valid, dropped;
};

// A token with anything that is not finite is dropped.
template <class V>
Tokens<V> load_tokens(const Inputs<typename V::Scalar>& in, int64_t sequence, int64_t t,
                      int64_t n) {
  const V zero(0);
  auto load = [&](const typename V::Scalar* x) { return load_up_to<V>(x + t, n, 0); };
  MaskOf<V> selected = lanes_up_to<V>(n);
  if (in.mask != nullptr) selected = selected & load_mask_up_to<V>(in.mask + t, n);
  Tokens<V> out;
  out.logprob = load(in.logprobs);
  out.old_logprob = load(in.old_logprobs);
  out.advantage = in.token_advantages ? load(in.advantages) : V(in.advantages[sequence]);
  V lost = (out.logprob - out.logprob) + (out.old_logprob - out.old_logprob) +
           (out.advantage - out.advantage);  // 0, or NaN
  out.weight = V(1);
  out.delta = out.entropy = zero;
  if (in.weights != nullptr) {
    out.weight = load(in.weights);
    lost = lost + (out.weight - out.weight);
  }
  if (in.entropy != nullptr) {
    out.entropy = load(in.entropy);
    lost = lost + (out.entropy - out.entropy);
  }
  if (in.ref_logprobs != nullptr) {
    const V ref = load(in.ref_logprobs);
    lost = lost + (ref - ref);
    out.delta = ref - out.logprob;
  }
  const auto finite = lost == zero;
  out.valid = selected & finite;
  out.dropped = selected & !finite;
  out.log_ratio = out.logprob - out.old_logprob;
  for (V* value : {&out.logprob, &out.old_logprob, &out.log_ratio, &out.advantage, &out.weight,
                   &out.delta, &out.entropy})
    *value = select(out.valid, *value, zero);
  return out;
}

template <class V>
LevelTerm<V> level_of(const Inputs<typename V::Scalar>& in, const Tokens<V>& token) {
  return level_term(in.choose, in.constants, token.log_ratio, token.advantage, token.weight);
}

template <class F>
struct SequenceStats {
  F count, score;  // valid tokens, sum of what they give to the score
};

template <class V>
SequenceStats<typename V::Scalar> sequence_stats(const Inputs<typename V::Scalar>& in,
                                                 int64_t sequence) {
  const int64_t begin = in.offsets[sequence], end = in.offsets[sequence + 1];
  V count(0), score(0);
  for (int64_t t = begin; t < end; t += V::kWidth) {
    const Tokens<V> tokens = load_tokens<V>(in, sequence, t, end - t);
    count = count + select(tokens.valid, V(1), V(0));
    score = score + select(tokens.valid, level_of(in, tokens).value, V(0));
  }
  return {reduce_sum(count), reduce_sum(score)};
}

// What is added up over a sequence: counts as integers, the rest a vector at a time.
template <class V>
struct Sums {
  using F = typename V::Scalar;
  int64_t tokens = 0, dropped = 0, below = 0, above = 0, capped = 0;
  V loss{F(0)}, approx_kl{F(0)}, approx_kl_k3{F(0)}, kl_ref{F(0)}, ratio{F(0)}, ratio_squared{F(0)};
  V entropy{F(0)}, weight{F(0)};
  V lowest{std::numeric_limits<F>::infinity()}, highest{-std::numeric_limits<F>::infinity()};

  void add(const Tokens<V>& token, V token_ratio, V used_ratio, const TokenTerms<V>& terms) {
    const V zero(F(0));
    tokens += count(token.valid);
    dropped += count(token.dropped);
    below += count(token.valid & terms.below);
    above += count(token.valid & terms.above);
    capped += count(token.valid & terms.capped);
    loss = loss + select(token.valid, terms.value, zero);
    approx_kl = approx_kl - token.log_ratio;
    approx_kl_k3 = approx_kl_k3 + exp_residual(token.log_ratio, token_ratio);
    kl_ref = kl_ref + select(token.valid, terms.kl, zero);
    const V shown = select(token.valid, used_ratio, zero);
    ratio = ratio + shown;
    ratio_squared = fma_of(shown, shown, ratio_squared);
    entropy = entropy + token.entropy;
    weight = weight + token.weight;
    lowest = select(token.valid & (used_ratio < lowest), used_ratio, lowest);
    highest = select(token.valid & (used_ratio > highest), used_ratio, highest);
  }

  Metrics metrics(F share) const {
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
    out[kWeight] = reduce_sum(weight);
    out[kNegativeRatioMin] = reduce_max(V(F(0)) - lowest);
    out[kRatioMax] = reduce_max(highest);
    return out;
  }
};

// The score of a sequence hands its gradient to every token that flows into it.
template <class V>
void spread_over_sequence(const Inputs<typename V::Scalar>& in, int64_t sequence,
                          typename V::Scalar part, typename V::Scalar* grad_logprobs) {
  const int64_t begin = in.offsets[sequence], end = in.offsets[sequence + 1];
  for (int64_t t = begin; t < end; t += V::kWidth) {
    const Tokens<V> tokens = load_tokens<V>(in, sequence, t, end - t);
    const V add = select(tokens.valid & level_of(in, tokens).flows, V(part), V(0));
    store_up_to(grad_logprobs + t, load_up_to<V>(grad_logprobs + t, end - t, 0) + add, end - t);
  }
}

template <class V>
Metrics sequence_loss(const Inputs<typename V::Scalar>& in, int64_t sequence,
                      typename V::Scalar* grad_logprobs, typename V::Scalar* grad_entropy) {
  using F = typename V::Scalar;
  const int64_t begin = in.offsets[sequence], end = in.offsets[sequence + 1];
  const V zero(0), lowest(in.constants.score_min), highest(in.constants.score_max);
  const PolicyChoices choose = in.choose;
  // whether the ratio is that of the token as it is, which the metrics ask for
  const bool own_ratio = choose.level == kToken && choose.rule != kVespo &&
                         std::isinf(in.constants.log_ratio_limit) &&
                         std::isinf(in.constants.score_min) && std::isinf(in.constants.score_max);

  F length = 1;  // valid tokens, at least 1
  V sequence_score = zero;
  if (choose.needs_count()) {
    const auto stats = sequence_stats<V>(in, sequence);
    length = stats.count > F(1) ? stats.count : F(1);
    sequence_score = V(choose.sums() ? stats.score : stats.score / length);
  }
  const F share = choose.aggregation == kSeqMeanTokenMean ? F(1) / length
                  : choose.aggregation == kLengthWeighted ? length
                                                          : F(1);  // a_i
  Sums<V> sums;
  V through_score = zero;  // d loss / d score, summed over the sequence
  for (int64_t t = begin; t < end; t += V::kWidth) {
    const int64_t n = end - t;
    const Tokens<V> token = load_tokens<V>(in, sequence, t, n);
    const LevelTerm<V> level = level_of(in, token);
    const V raw = choose.by_sequence() ? sequence_score : level.value;
    const V score = clamp_to(raw, lowest, highest), ratio = exp_of(score);
    MaskOf<V> score_flows = score == raw;
    if (!choose.by_sequence()) score_flows = score_flows & level.flows;
    TokenTerms<V> terms =
        token_terms(choose, in.constants,
                    TokenInput<V>{score, ratio, token.advantage, token.logprob, token.old_logprob,
                                  token.weight, token.delta, token.entropy, score_flows},
                    in.ref_logprobs != nullptr);
    terms.below = terms.below | level.below;
    terms.above = terms.above | level.above;
    sums.add(token, own_ratio ? ratio : exp_of(token.log_ratio), ratio, terms);
    V grad = terms.d_logprob;
    if (choose.spreads())
      through_score = through_score + select(token.valid, terms.d_score, zero);
    else
      grad = grad + terms.d_score;
    store_up_to(grad_logprobs + t, select(token.valid, grad * V(share), zero), n);
    if (in.entropy != nullptr)
      store_up_to(grad_entropy + t,
                  select(token.valid, V(-in.constants.entropy_coef * share), zero), n);
  }
  if (choose.spreads()) {
    const F part = reduce_sum(through_score) * share;
    spread_over_sequence<V>(in, sequence, choose.sums() ? part : part / length, grad_logprobs);
  }
  return sums.metrics(share);
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
    std::vector<int64_t> choices, std::vector<double> constants) {
  const int64_t total = logprobs.numel(), sequences = offsets.numel() - 1;
  const auto dtype = logprobs.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "logprobs must be float32 or float64");
  STD_TORCH_CHECK(choices.size() == kPolicyChoices && constants.size() == kPolicyConstants,
                  "choices and constants must be those of a PolicyLossConfig");
  const PolicyChoices choose = policy_choices(choices);
  STD_TORCH_CHECK(choose.kl == kNoKl || ref_logprobs, "a KL term needs ref_logprobs");
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
                       choose,
                       policy_constants<F>(constants)};
    const double given = device_normalizer ? *flat(*device_normalizer, "normalizer", 1) : 0;
    Tensor loss = torch::stable::new_empty(logprobs, {}, dtype);
    Tensor scale = torch::stable::new_empty(logprobs, {}, dtype);
    Tensor metrics = torch::stable::new_empty(logprobs, {kSlots}, ScalarType::Double);
    Tensor grad_logprobs = torch::stable::new_empty(logprobs, {total}, dtype);
    Tensor grad_entropy = torch::stable::new_empty(logprobs, {entropy ? total : 0}, dtype);
    const Metrics sums = batch_loss(in, sequences, data<F>(grad_logprobs), data<F>(grad_entropy));
    const double factor =
        scale_of(sums, choose.aggregation, normalizer, device_normalizer ? &given : nullptr);
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
