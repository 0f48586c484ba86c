// policy_loss: the clipped policy objective, its gradient and its metrics, from the log-probs of
// packed sequences.
//
//   per token, flat [total]; sequence i is offsets[i] ... offsets[i + 1]
//   -> loss and scale (0-d), metrics [16], grad_logprobs and grad_entropy [total]: times `scale`
//   l_t = weight_t rule(ratio_t, A_t) + kl_coef kl(ref_t - lp_t) - entropy_coef H_t
//
//   Reads 12 to 25 bytes a token and writes 4 or 8. What the whole sequence decides (its score, its
//   length, the gradient through the score) takes another sweep, then in cache.
//   One block a sequence, then one block over the sequences; threads are joined in double, in one
//   fixed order, without atomics: the bits depend neither on timing nor on other sequences.
//   Limits: one block reads a whole sequence, so one of a million tokens is latency-bound.
#pragma once

#include "../math/policy_metrics.h"
#include "../math/policy_terms.h"
#include "block.cuh"

namespace pyllmtune {

constexpr int kPolicyThreads = 256;
constexpr int kTotalThreads = 512;

struct PolicyConfig {
  PolicyChoices choose;
  PolicyConstants<float> constants;
};

struct PolicyToken {
  bool selected, valid;
  float logprob, old_logprob, log_ratio, delta, advantage, weight,
      entropy;  // delta = ref - logprob
};

struct PolicyTokens {
  int64_t total;
  const float *logprobs, *old_logprobs, *advantages;
  bool token_advantages;
  const int64_t* offsets;
  const bool* mask;  // or null, as are the next three
  const float *ref_logprobs, *entropy, *weights;

  // Everything is loaded before anything is decided, so that the loads overlap. A token with
  // anything that is not finite is dropped.
  __device__ PolicyToken load(int64_t t, int64_t sequence) const {
    const float logprob = logprobs[t], old = old_logprobs[t];
    const float advantage = advantages[token_advantages ? t : sequence];
    const float ref = ref_logprobs == nullptr ? logprob : ref_logprobs[t];
    const float weight = weights == nullptr ? 1.0f : weights[t];
    const float bonus = entropy == nullptr ? 0.0f : entropy[t];
    const bool selected = mask == nullptr ? true : mask[t];
    const bool finite = is_finite(logprob) && is_finite(old) && is_finite(advantage) &&
                        is_finite(ref) && is_finite(weight) && is_finite(bonus);
    return {selected,      selected && finite, logprob, old,  logprob - old,
            ref - logprob, advantage,          weight,  bonus};
  }
};

struct PolicyGradients {
  float *logprobs, *entropy;  // entropy is null where the input is
};

__device__ inline double empty_metric(int metric) { return metric < kMetricSums ? 0.0 : -INFINITY; }
__device__ inline double join_metric(int metric, double a, double b) {
  return metric < kMetricSums ? a + b : max_of(a, b);
}

// What one thread has seen. It sums some T / 256 tokens: float will do, except for the loss, whose
// terms cancel.
struct ThreadMetrics {
  float at[kMetrics];
  double loss;
};

// Metric threadIdx.x % 16 of `count` rows, `pitch` apart, joined in a fixed order; right in the
// first 16 threads.
__device__ inline double join_rows(const double* rows, int64_t count, int pitch) {
  PLT_SHARED(double, of_group, kTotalThreads);
  const int metric = threadIdx.x % kMetrics, group = threadIdx.x / kMetrics,
            groups = blockDim.x / kMetrics;
  double joined = empty_metric(metric);
  for (int64_t row = group; row < count; row += groups)
    joined = join_metric(metric, joined, rows[row * pitch + metric]);
  of_group[threadIdx.x] = joined;
  __syncthreads();
  if (group == 0)
    for (int other = 1; other < groups; ++other)
      joined = join_metric(metric, joined, of_group[other * kMetrics + metric]);
  return joined;
}

struct SequenceStats {
  double tokens, score;  // valid tokens, sum of what they give to the score
};

__device__ inline LevelTerm<float> level_of(const PolicyConfig& config, const PolicyToken& token) {
  return level_term(config.choose, config.constants, token.log_ratio, token.advantage,
                    token.weight);
}

__device__ inline SequenceStats sequence_stats(const PolicyTokens& in, const PolicyConfig& config,
                                               int64_t sequence, int64_t begin, int64_t end) {
  SequenceStats mine{0.0, 0.0};
  for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
    const PolicyToken token = in.load(t, sequence);
    if (!token.valid) continue;
    mine.tokens += 1.0;
    mine.score += level_of(config, token).value;
  }
  return block_broadcast(block_reduce(mine, SequenceStats{0.0, 0.0}, [](const SequenceStats& part) {
    return warp_join(part, [](const SequenceStats& a, const SequenceStats& b) {
      return SequenceStats{a.tokens + b.tokens, a.score + b.score};
    });
  }));
}

struct TokenGradient {
  float logprob, score;  // d loss / d logprob at a fixed score, d loss / d score
};

// Loss of one valid token: adds to `row`, returns its gradient.
__device__ inline TokenGradient token_loss(const PolicyToken& token, const PolicyConfig& config,
                                           float sequence_score, bool has_reference,
                                           ThreadMetrics& row) {
  const PolicyChoices& choose = config.choose;
  const LevelTerm<float> level = level_of(config, token);
  const float raw = choose.by_sequence() ? sequence_score : level.value;
  const float score = clamp_to(raw, config.constants.score_min, config.constants.score_max);
  const float ratio = exp_of(score);
  const bool flows = score == raw && (choose.by_sequence() || level.flows);
  const TokenTerms<float> terms =
      token_terms(choose, config.constants,
                  TokenInput<float>{score, ratio, token.advantage, token.logprob, token.old_logprob,
                                    token.weight, token.delta, token.entropy, flows},
                  has_reference, true);
  row.loss += terms.value;
  row.at[kTokens] += 1.0f;
  row.at[kSequences] += 1.0f;  // tokens for now; whether there are any is asked at the end
  row.at[kClippedLow] += terms.below || level.below;
  row.at[kClippedHigh] += terms.above || level.above;
  row.at[kClippedCap] += terms.capped;
  row.at[kApproxKl] -= token.log_ratio;
  row.at[kApproxKlK3] +=
      exp_residual(token.log_ratio, score == token.log_ratio ? ratio : exp_of(token.log_ratio));
  row.at[kKlRef] += terms.kl;
  row.at[kRatio] += ratio;
  row.at[kRatioSquared] += ratio * ratio;
  row.at[kEntropy] += token.entropy;
  row.at[kWeight] += token.weight;
  row.at[kNegativeRatioMin] = max_of(-ratio, row.at[kNegativeRatioMin]);
  row.at[kRatioMax] = max_of(ratio, row.at[kRatioMax]);
  return {terms.d_logprob, terms.d_score};
}

// Block i: the gradients of sequence i, and its row of metrics.
__global__ void __launch_bounds__(kPolicyThreads)
    policy_loss_kernel(PolicyTokens in, PolicyConfig config, PolicyGradients grads,
                       double* __restrict__ metrics) {
  const int64_t sequence = blockIdx.x;
  // clamped: offsets on a GPU are not checked, and must not lead outside the tokens
  const int64_t begin = min(max(in.offsets[sequence], int64_t(0)), in.total);
  const int64_t end = min(in.offsets[sequence + 1], in.total);
  const PolicyChoices choose = config.choose;
  const bool spreads = choose.spreads(), has_reference = in.ref_logprobs != nullptr;

  double length = 1.0;  // valid tokens, at least 1
  float sequence_score = 0.0f;
  if (choose.needs_count()) {
    const SequenceStats stats = sequence_stats(in, config, sequence, begin, end);
    length = stats.tokens > 1.0 ? stats.tokens : 1.0;
    sequence_score = static_cast<float>(choose.sums() ? stats.score : stats.score / length);
  }
  const float share = choose.aggregation == kSeqMeanTokenMean ? static_cast<float>(1.0 / length)
                      : choose.aggregation == kLengthWeighted ? static_cast<float>(length)
                                                              : 1.0f;

  ThreadMetrics mine;
  mine.loss = 0.0;
#pragma unroll
  for (int m = 0; m < kMetrics; ++m) mine.at[m] = static_cast<float>(empty_metric(m));
  double through_score = 0.0;
  for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
    const PolicyToken token = in.load(t, sequence);
    TokenGradient grad{0.0f, 0.0f};
    if (token.valid)
      grad = token_loss(token, config, sequence_score, has_reference, mine);
    else if (token.selected)
      mine.at[kDropped] += 1.0f;
    if (spreads) through_score += grad.score;
    grads.logprobs[t] = share * (spreads ? grad.logprob : grad.logprob + grad.score);
    if (grads.entropy != nullptr)
      grads.entropy[t] = token.valid ? -config.constants.entropy_coef * share : 0.0f;
  }

  if (spreads) {  // the score hands its gradient to every token that flows into it
    const double flow = block_broadcast(block_reduce(through_score, 0.0, [](double part) {
      return warp_join(part, [](double a, double b) { return a + b; });
    }));
    const float each = static_cast<float>((choose.sums() ? flow : flow / length) * share);
    for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
      const PolicyToken token = in.load(t, sequence);
      if (token.valid && level_of(config, token).flows) grads.logprobs[t] += each;
    }
  }

  // 17, not 16: threads that write one metric of their rows meet different banks
  constexpr int kPitch = kMetrics + 1, kCells = kPolicyThreads * kPitch;
  PLT_SHARED(double, of_thread, kCells);
#pragma unroll
  for (int m = 0; m < kMetrics; ++m)
    of_thread[threadIdx.x * kPitch + m] = m == kLoss ? mine.loss : mine.at[m];
  __syncthreads();
  const int metric = threadIdx.x;
  double value = join_rows(of_thread, blockDim.x, kPitch);
  if (metric >= kMetrics) return;
  if (metric == kSequences) value = value > 0.0 ? 1.0 : 0.0;  // it held the number of tokens
  if (metric == kLoss) value *= share;
  metrics[sequence * kMetrics + metric] = value;
}

// One block: metrics of the batch, then loss and scale.
__global__ void __launch_bounds__(kTotalThreads)
    policy_loss_total_kernel(const double* __restrict__ rows, int64_t sequences, int aggregation,
                             float normalizer, const float* __restrict__ device_normalizer,
                             float* __restrict__ loss, double* __restrict__ metrics,
                             float* __restrict__ scale) {
  PLT_SHARED(double, total, kMetrics);
  const double value = join_rows(rows, sequences, kMetrics);
  if (threadIdx.x < kMetrics) total[threadIdx.x] = metrics[threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double divisor = aggregation == kTokenMean ? total[kTokens] : total[kSequences];
  if (normalizer != 0.0f) divisor = normalizer;
  if (device_normalizer != nullptr) divisor = *device_normalizer;
  const double factor = total[kTokens] > 0.0 ? 1.0 / divisor : 0.0;
  *scale = static_cast<float>(factor);
  *loss = static_cast<float>(total[kLoss] * factor);
}

// `rows` is scratch, [sequences, 16].
inline void launch_policy_loss(const PolicyTokens& in, const PolicyConfig& config,
                               int64_t sequences, float normalizer, const float* device_normalizer,
                               const PolicyGradients& grads, double* rows, float* loss,
                               double* metrics, float* scale, cudaStream_t stream) {
  if (sequences > 0)
    PLT_LAUNCH(policy_loss_kernel, dim3(static_cast<unsigned>(sequences)), dim3(kPolicyThreads), 0,
               stream, in, config, grads, rows);
  PLT_LAUNCH(policy_loss_total_kernel, dim3(1), dim3(kTotalThreads), 0, stream, rows, sequences,
             config.choose.aggregation, normalizer, device_normalizer, loss, metrics, scale);
}

}  // namespace pyllmtune
