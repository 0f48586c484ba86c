// policy_loss: the clipped policy objective, its gradient and its metrics, from the log-probs of
// packed sequences.
//
//   per token, flat [total]; sequence i is offsets[i] ... offsets[i + 1]
//   -> loss and scale (0-d), metrics [16], grad_logprobs and grad_entropy [total]: times `scale`
//   l_t = weight_t rule(ratio_t, A_t) + kl_coef kl(ref_t - lp_t) - entropy_coef H_t
//
//   Reads 12 to 25 bytes a token and writes 4 or 8. What the whole sequence decides (its mean
//   log-ratio, its length, the gradient through that mean) takes another sweep, then in cache.
//   One block a sequence, then one block over the sequences; threads are joined in double, in one
//   fixed order, without atomics: the bits depend neither on timing nor on other sequences.
//   Limits: one block reads a whole sequence, so one of a million tokens is latency-bound.
#pragma once

#include "../math/policy_rules.h"
#include "block.cuh"

namespace pyllmtune {

constexpr int kPolicyThreads = 256;
constexpr int kTotalThreads = 512;

// Order of pyllmtune/losses/metrics.py.
enum Metric : int {
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
  kNegativeRatioMin,
  kRatioMax,
  kMetrics
};
constexpr int kMetricSums = kNegativeRatioMin;  // those from here on are maxima

struct PolicyConfig {
  int level, rule, kl, aggregation;
  float low, high, cap, kl_coef, entropy_coef;

  __device__ bool averages_sequences() const { return aggregation == kSeqMeanTokenMean; }
};

struct PolicyToken {
  bool selected, valid;
  float logprob, log_ratio, delta, advantage, weight, entropy;  // delta = ref - logprob
};

struct PolicyTokens {
  int64_t total;
  const float *logprobs, *old_logprobs, *advantages;
  bool token_advantages;
  const int64_t* offsets;
  const bool* mask;  // or null, as are the next three
  const float *ref_logprobs, *entropy, *weights;

  // Everything is loaded before anything is decided, so that the loads overlap.
  __device__ PolicyToken load(int64_t t, int64_t sequence) const {
    const float logprob = logprobs[t], old = old_logprobs[t];
    const float ref = ref_logprobs == nullptr ? logprob : ref_logprobs[t];
    const bool selected = mask == nullptr ? true : mask[t];
    const bool finite = is_finite(old) && (ref_logprobs == nullptr || is_finite(ref));
    return {selected,
            selected && finite,
            logprob,
            logprob - old,
            ref_logprobs == nullptr ? 0.0f : ref - logprob,
            advantages[token_advantages ? t : sequence],
            weights == nullptr ? 1.0f : weights[t],
            entropy == nullptr ? 0.0f : entropy[t]};
  }
};

struct PolicyGradients {
  float *logprobs, *entropy;  // entropy is null where the input is
};

// The larger of two, NaN if either is.
template <class F>
__device__ inline F max_or_nan(F a, F b) {
  return a > b || a != a ? a : b;
}

__device__ inline double empty_metric(int metric) { return metric < kMetricSums ? 0.0 : -INFINITY; }
__device__ inline double join_metric(int metric, double a, double b) {
  return metric < kMetricSums ? a + b : max_or_nan(a, b);
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

struct LogRatioSum {
  double tokens, log_ratio;
};

// Number of valid tokens and sum of their log-ratios.
__device__ inline LogRatioSum log_ratio_sum(const PolicyTokens& in, int64_t sequence, int64_t begin,
                                            int64_t end) {
  LogRatioSum mine{0.0, 0.0};
  for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
    const PolicyToken token = in.load(t, sequence);
    if (!token.valid) continue;
    mine.tokens += 1.0;
    mine.log_ratio += token.log_ratio;
  }
  return block_broadcast(block_reduce(mine, LogRatioSum{0.0, 0.0}, [](const LogRatioSum& part) {
    return warp_join(part, [](const LogRatioSum& a, const LogRatioSum& b) {
      return LogRatioSum{a.tokens + b.tokens, a.log_ratio + b.log_ratio};
    });
  }));
}

struct TokenGradient {
  float logprob, through_ratio;  // d loss / d logprob at a fixed ratio, d loss / d log-ratio
};

// Loss of one valid token: adds to `row`, returns its gradient.
__device__ inline TokenGradient token_loss(const PolicyToken& token, const PolicyConfig& config,
                                           float score, ThreadMetrics& row) {
  const float ratio = exp_of(score);
  const RuleResult<float> rule = apply_rule(config.rule, ratio, token.advantage, token.logprob,
                                            config.low, config.high, config.cap);
  const bool on = token.weight != 0.0f;  // selected, not multiplied: 0 * inf is no loss
  float value = on ? token.weight * rule.value : 0.0f;
  TokenGradient grad{on ? token.weight * rule.d_logprob : 0.0f,
                     on ? token.weight * rule.d_log_ratio : 0.0f};
  const KlResult<float> kl = kl_estimate(config.kl, token.delta);  // without a term, k3 is measured
  if (config.kl != kNoKl) {
    value += config.kl_coef * kl.value;
    grad.logprob += config.kl_coef * kl.d_logprob;
  }
  value -= config.entropy_coef * token.entropy;

  row.loss += value;
  row.at[kTokens] += 1.0f;
  row.at[kSequences] += 1.0f;  // tokens for now; whether there are any is asked at the end
  row.at[kClippedLow] += rule.below;
  row.at[kClippedHigh] += rule.above;
  row.at[kClippedCap] += rule.capped;
  row.at[kApproxKl] -= token.log_ratio;
  row.at[kApproxKlK3] +=
      exp_residual(token.log_ratio, config.level == kTokenLevel ? ratio : exp_of(token.log_ratio));
  row.at[kKlRef] += kl.value;
  row.at[kRatio] += ratio;
  row.at[kRatioSquared] += ratio * ratio;
  row.at[kEntropy] += token.entropy;
  row.at[kWeight] += token.weight;
  row.at[kNegativeRatioMin] = max_or_nan(-ratio, row.at[kNegativeRatioMin]);
  row.at[kRatioMax] = max_or_nan(ratio, row.at[kRatioMax]);
  return grad;
}

// Block i: the gradients of sequence i, and its row of metrics.
__global__ void __launch_bounds__(kPolicyThreads)
    policy_loss_kernel(PolicyTokens in, PolicyConfig config, PolicyGradients grads,
                       double* __restrict__ metrics) {
  const int64_t sequence = blockIdx.x;
  // clamped: offsets on a GPU are not checked, and must not lead outside the tokens
  const int64_t begin = min(max(in.offsets[sequence], int64_t(0)), in.total);
  const int64_t end = min(in.offsets[sequence + 1], in.total);
  const bool sequence_level = config.level == kSequenceLevel;

  float per_token = 1.0f, sequence_score = 0.0f;  // 1 / n, mean log-ratio
  if (sequence_level || config.averages_sequences()) {
    const LogRatioSum sum = log_ratio_sum(in, sequence, begin, end);
    const double n = sum.tokens > 1.0 ? sum.tokens : 1.0;
    per_token = static_cast<float>(1.0 / n);
    sequence_score = static_cast<float>(sum.log_ratio / n);
  }
  const float share = config.averages_sequences() ? per_token : 1.0f;

  ThreadMetrics mine;
  mine.loss = 0.0;
#pragma unroll
  for (int m = 0; m < kMetrics; ++m) mine.at[m] = static_cast<float>(empty_metric(m));
  double through_ratio = 0.0;
  for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
    const PolicyToken token = in.load(t, sequence);
    TokenGradient grad{0.0f, 0.0f};
    if (token.valid)
      grad = token_loss(token, config, sequence_level ? sequence_score : token.log_ratio, mine);
    else if (token.selected)
      mine.at[kDropped] += 1.0f;
    if (sequence_level) through_ratio += grad.through_ratio;
    grads.logprobs[t] = share * (sequence_level ? grad.logprob : grad.logprob + grad.through_ratio);
    if (grads.entropy != nullptr)
      grads.entropy[t] = token.valid ? -config.entropy_coef * share : 0.0f;
  }

  if (sequence_level) {
    // d score / d lp_t = 1 / n for every valid token
    const double flow = block_broadcast(block_reduce(through_ratio, 0.0, [](double part) {
      return warp_join(part, [](double a, double b) { return a + b; });
    }));
    const float each = static_cast<float>(flow) * per_token * share;
    for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x)
      if (in.load(t, sequence).valid) grads.logprobs[t] += each;
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
             config.aggregation, normalizer, device_normalizer, loss, metrics, scale);
}

}  // namespace pyllmtune
