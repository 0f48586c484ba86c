// policy_loss: clipped policy objective, KL penalty and entropy bonus, with their gradient and
// metrics, in one pass.
//
//   loss = scale * sum_i a_i sum_t [ weight * rule(ratio, A) + kl_coef * k(ref - lp)
//                                    - entropy_coef * H ]
//   Per-token arrays are flat [total]; sequence i is offsets[i]:offsets[i + 1]. a_i is 1, 1/n_i or
//   n_i, scale is 1/normalizer. grad_logprobs, grad_entropy [total]: d (loss / scale); scale is
//   known last, so backward multiplies by it.
//   Reads 9 to 25 bytes a token and writes 4 or 8. PPO and k3, at token and at sequence level, have
//   kernels of their own, in which the compiler knows the choices; the bits are those of the
//   general kernel. What needs the whole sequence first (n_i, the mean log-ratio) takes a pass of
//   its own over data that is then in cache. Threads take whole sequences; sums are kept in double
//   and added in order, so nothing depends on their number.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "parallel.h"
#include "policy_sums.h"
#include "sequences.h"

#if defined(__SANITIZE_ADDRESS__)  // whose checks, all inlined into one function, take minutes
#undef PLT_FLATTEN
#define PLT_FLATTEN
#endif

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

// Choices of which all but the aggregation are constants, once inlined: PPO without limits.
template <int kLevel, int kKl>
struct Ppo : PolicyChoices {
  static constexpr bool kLimited = false;

  explicit Ppo(const PolicyChoices& choose)
      : PolicyChoices{kLevel, kPpo, kKl, kPlain, choose.aggregation} {}
};

template <class V, class Choices>
LevelTerm<V> level_of(const PolicyInputs<typename V::Scalar>& in, const Choices& choose,
                      const PolicyTokens<V>& token) {
  return level_term(choose, in.constants, token.log_ratio, token.advantage, token.weight);
}

template <class F>
struct SequenceStats {
  F count, score;  // valid tokens, sum of what they give to the score
};

template <class V, class Choices>
SequenceStats<typename V::Scalar> sequence_stats(const PolicyInputs<typename V::Scalar>& in,
                                                 const Choices& choose, int64_t sequence) {
  V score(0);
  int64_t tokens = 0;
  for_vectors<V>(in.offsets[sequence], in.offsets[sequence + 1], [&](int64_t t, int64_t n) {
    const PolicyTokens<V> token = load_tokens<V>(in, sequence, t, n);
    tokens += count(token.valid);
    if (choose.by_sequence())
      score = score + select(token.valid, level_of(in, choose, token).value, V(0));
  });
  return {static_cast<typename V::Scalar>(tokens), reduce_sum(score)};
}

// a_i of a sequence with so many valid tokens, at least 1
template <class F>
F share_of(const PolicyChoices& choose, F length) {
  return choose.aggregation == kSeqMeanTokenMean ? F(1) / length
         : choose.aggregation == kLengthWeighted ? length
                                                 : F(1);
}

// The score of a sequence hands its gradient to every token that flows into it.
template <class V, class Choices>
void spread_over_sequence(const PolicyInputs<typename V::Scalar>& in, const Choices& choose,
                          int64_t sequence, typename V::Scalar part,
                          typename V::Scalar* grad_logprobs) {
  for_vectors<V>(in.offsets[sequence], in.offsets[sequence + 1], [&](int64_t t, int64_t n) {
    const PolicyTokens<V> token = load_tokens<V>(in, sequence, t, n);
    const V add = select(token.valid & level_of(in, choose, token).flows, V(part), V(0));
    store_up_to(grad_logprobs + t, load_up_to<V>(grad_logprobs + t, n, 0) + add, n);
  });
}

template <class V, class Known>
PLT_FLATTEN PolicyMetrics sequence_loss(const PolicyInputs<typename V::Scalar>& in,
                                        const PolicyChoices& choices, int64_t sequence,
                                        typename V::Scalar* grad_logprobs,
                                        typename V::Scalar* grad_entropy) {
  using F = typename V::Scalar;
  const Known choose(choices);
  const F score_min = in.constants.score_min, score_max = in.constants.score_max;
  const bool limits_score = Known::kLimited && !(std::isinf(score_min) && std::isinf(score_max));
  // whether the ratio is that of the token as it is, which the metrics ask for
  const bool own_ratio = choose.level == kToken && choose.rule != kVespo && !limits_score &&
                         (!Known::kLimited || std::isinf(in.constants.log_ratio_limit));

  F length = 1;  // valid tokens, at least 1
  V sequence_score(0);
  if (choose.needs_count()) {
    const auto stats = sequence_stats<V>(in, choose, sequence);
    length = stats.count > F(1) ? stats.count : F(1);
    sequence_score = V(choose.sums() ? stats.score : stats.score / length);
  }
  const F share = share_of(choose, length);
  PolicySums<V> sums;
  V through_score(0);  // d loss / d score, summed over the sequence
  const auto step = [&](int64_t t, int64_t n) {
    const PolicyTokens<V> token = load_tokens<V>(in, sequence, t, n);
    const LevelTerm<V> level = level_of(in, choose, token);
    const V raw = choose.by_sequence() ? sequence_score : level.value;
    const V score = limits_score ? clamp_to(raw, V(score_min), V(score_max)) : raw;
    const ExpPair<V> ratio = exp_pair(score);
    MaskOf<V> score_flows = score == raw;
    if (!choose.by_sequence()) score_flows = score_flows & level.flows;
    TokenTerms<V> terms = token_terms(
        choose, in.constants,
        TokenInput<V>{score, ratio.value, token.advantage, token.logprob, token.old_logprob,
                      token.weight, token.delta, token.entropy, score_flows},
        in.ref_logprobs != nullptr, in.weights != nullptr);
    terms.below = terms.below | level.below;
    terms.above = terms.above | level.above;
    sums.add(in, token, own_ratio ? ratio.residual : exp_pair(token.log_ratio).residual,
             ratio.value, terms);
    V grad = terms.d_logprob;
    if (choose.spreads())
      through_score = through_score + select(token.valid, terms.d_score, V(0));
    else
      grad = grad + terms.d_score;
    store_up_to(grad_logprobs + t, select(token.valid, grad * V(share), V(0)), n);
    if (in.entropy != nullptr)
      store_up_to(grad_entropy + t,
                  select(token.valid, V(-in.constants.entropy_coef * share), V(0)), n);
  };
  for_vectors<V>(in.offsets[sequence], in.offsets[sequence + 1], step);
  if (choose.spreads()) {
    const F part = reduce_sum(through_score) * share;
    spread_over_sequence<V>(in, choose, sequence, choose.sums() ? part : part / length,
                            grad_logprobs);
  }
  return sums.metrics(in, share);
}

// Whether all valid tokens of a sequence have one loss and one gradient: a ratio of the sequence,
// an advantage of the sequence, and nothing else.
template <class F>
bool is_uniform(const PolicyInputs<F>& in, const PolicyChoices& choose) {
  const bool level = choose.by_sequence() && choose.level != kGeometric;
  const bool rule = choose.rule == kPpo || choose.rule == kUnclipped || choose.rule == kClip ||
                    choose.rule == kSapo;
  return level && rule && !in.token_advantages && in.weights == nullptr &&
         in.ref_logprobs == nullptr && in.entropy == nullptr &&
         std::isinf(in.constants.log_ratio_limit);
}

// Then that loss and gradient are found once, between a pass that adds up the log-ratios and leaves
// 1 for each valid token where its gradient will be, and one that writes the gradient.
template <class V>
PLT_FLATTEN PolicyMetrics uniform_loss(const PolicyInputs<typename V::Scalar>& in,
                                       const PolicyChoices& choose, int64_t sequence,
                                       typename V::Scalar* grad_logprobs,
                                       typename V::Scalar* /*grad_entropy*/) {
  using F = typename V::Scalar;
  const int64_t begin = in.offsets[sequence], end = in.offsets[sequence + 1];
  const V zero(0), one(1);
  int64_t tokens = 0, dropped = 0;
  V log_ratio = zero, k3 = zero;
  for_vectors<V>(begin, end, [&](int64_t t, int64_t n) {
    const PolicyTokens<V> token = load_tokens<V>(in, sequence, t, n);
    tokens += count(token.valid);
    dropped += count(token.dropped);
    log_ratio = log_ratio + token.log_ratio;
    k3 = k3 + exp_pair(token.log_ratio).residual;
    store_up_to(grad_logprobs + t, select(token.valid, one, zero), n);
  });
  PolicyMetrics out;
  out[kDropped] = dropped;
  if (tokens == 0) {
    std::fill(grad_logprobs + begin, grad_logprobs + end, F(0));
    return out;
  }
  const F length = tokens, sum = reduce_sum(log_ratio), raw = choose.sums() ? sum : sum / length;
  const V score = clamp_to(V(raw), V(in.constants.score_min), V(in.constants.score_max));
  const V ratio = exp_of(score);
  const TokenTerms<V> terms =
      token_terms(choose, in.constants,
                  TokenInput<V>{score, ratio, V(in.advantages[sequence]), zero, zero, one, zero,
                                zero, score == V(raw)},
                  false, false);
  const F share = share_of(choose, length), weight = reduce_max(ratio);
  // at a level that spreads, a token gets 1/n of n times this, and of the sum n times this
  const F factor = choose.spreads() && choose.sums() ? length * share : share;
  const V grad = terms.d_score * V(factor);
  for_vectors<V>(begin, end, [&](int64_t t, int64_t n) {
    const V valid = load_up_to<V>(grad_logprobs + t, n, 0);
    store_up_to(grad_logprobs + t, select(valid == one, grad, zero), n);
  });
  out[kTokens] = out[kWeight] = tokens;
  out[kSequences] = 1;
  out[kLoss] = tokens * static_cast<double>(reduce_max(terms.value)) * share;
  out[kClippedLow] = count(terms.below) ? tokens : 0;
  out[kClippedHigh] = count(terms.above) ? tokens : 0;
  out[kClippedCap] = count(terms.capped) ? tokens : 0;
  out[kApproxKl] = -sum;
  out[kApproxKlK3] = reduce_sum(k3);
  out[kRatio] = tokens * static_cast<double>(weight);
  out[kRatioSquared] = out[kRatio] * weight;
  out[kNegativeRatioMin] = -weight;
  out[kRatioMax] = weight;
  return out;
}

template <class F>
using SequenceLoss = PolicyMetrics (*)(const PolicyInputs<F>&, const PolicyChoices&, int64_t, F*,
                                       F*);

// The kernel compiled for these choices, or the one for all.
template <class F>
SequenceLoss<F> kernel_for(const PolicyInputs<F>& in, const PolicyChoices& choose) {
  using V = typename VectorOf<F>::type;
  if (is_uniform(in, choose)) return uniform_loss<V>;
  const PolicyConstants<F>& c = in.constants;
  if constexpr (kSpecialize && std::is_same_v<F, float>) {
    bool plain = choose.rule == kPpo && choose.kl_gradient == kPlain;
    for (F limit : {c.log_ratio_limit, -c.score_min, c.score_max, c.kl_input_limit, c.kl_limit})
      plain = plain && limit == std::numeric_limits<F>::infinity();
    if (plain && choose.level == kToken && choose.kl == kNoKl)
      return sequence_loss<V, Ppo<kToken, kNoKl>>;
    if (plain && choose.level == kToken && choose.kl == kK3)
      return sequence_loss<V, Ppo<kToken, kK3>>;
    if (plain && choose.level == kSequence && choose.kl == kNoKl)
      return sequence_loss<V, Ppo<kSequence, kNoKl>>;
    if (plain && choose.level == kSequence && choose.kl == kK3)
      return sequence_loss<V, Ppo<kSequence, kK3>>;
  }
  return sequence_loss<V, PolicyChoices>;
}

template <class F>
PolicyMetrics batch_loss(const PolicyInputs<F>& in, const PolicyChoices& choose, int64_t sequences,
                         F* grad_logprobs, F* grad_entropy) {
  const SequenceLoss<F> kernel = kernel_for(in, choose);
  std::vector<PolicyMetrics> parts(sequences);
  const int64_t* ends = in.offsets + sequences;
  // a thread takes the sequences that begin among its tokens
  parallel_for(*ends, kTokenGrain, [&](int64_t begin, int64_t end) {
    const int64_t* sequence = std::lower_bound(in.offsets, ends, begin);
    for (; sequence < ends && *sequence < end; ++sequence) {
      const int64_t i = sequence - in.offsets;
      parts[i] = kernel(in, choose, i, grad_logprobs, grad_entropy);
    }
  });
  PolicyMetrics all;
  for (const PolicyMetrics& part : parts) all.join(part);
  return all;
}

double scale_of(const PolicyMetrics& metrics, int aggregation, double normalizer,
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
    const PolicyInputs<F> in{flat(logprobs, "logprobs", total),
                             flat(old_logprobs, "old_logprobs", total),
                             flat(advantages, "advantages", token_advantages ? total : sequences),
                             mask ? data<const bool>(*mask) : nullptr,
                             optional(ref_logprobs, "ref_logprobs"),
                             optional(entropy, "entropy"),
                             optional(weights, "weights"),
                             check_offsets(offsets, total),
                             token_advantages,
                             policy_constants<F>(constants)};
    const double given = device_normalizer ? *flat(*device_normalizer, "normalizer", 1) : 0;
    Tensor loss = torch::stable::new_empty(logprobs, {}, dtype);
    Tensor scale = torch::stable::new_empty(logprobs, {}, dtype);
    Tensor metrics = torch::stable::new_empty(logprobs, {kMetrics}, ScalarType::Double);
    Tensor grad_logprobs = torch::stable::new_empty(logprobs, {total}, dtype);
    Tensor grad_entropy = torch::stable::new_empty(logprobs, {entropy ? total : 0}, dtype);
    const PolicyMetrics sums =
        batch_loss(in, choose, sequences, data<F>(grad_logprobs), data<F>(grad_entropy));
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
