// token_logprobs: checks, launch and registration of the kernels in token_logprobs.cuh.
#include "token_logprobs.cuh"
#include "types.h"

namespace pyllmtune {
namespace {

// 2^27 columns: column numbers are int, and a row must not need more than 65,535 tiles.
constexpr int64_t kMaxVocab = int64_t(1) << 27, kMaxRows = INT32_MAX;

RowLayout layout_of(const Tensor& x) {  // x [outer, inner, V]
  return {static_cast<uint32_t>(x.size(1) > 0 ? x.size(1) : 1), x.stride(0), x.stride(1)};
}

ScoreRows check_rows(const OnDevice& device, const Tensor& logits, const Tensor& tokens,
                     double temperature, const std::optional<Tensor>& row_temperature,
                     const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(logits.dim() == 3, "logits must be [outer, inner, V]");
  const int64_t rows = logits.size(0) * logits.size(1), vocab = logits.size(2);
  STD_TORCH_CHECK(vocab > 0 && (vocab == 1 || logits.stride(2) == 1),
                  "logits must be contiguous along V > 0");
  STD_TORCH_CHECK(vocab <= kMaxVocab && rows <= kMaxRows,
                  "logits must have at most 2^27 columns and 2^31 - 1 rows, got ", vocab, " and ",
                  rows);
  return {rows,
          static_cast<int>(vocab),
          device.flat<const int64_t>(tokens, rows, ScalarType::Long, "tokens"),
          device.flat<const bool>(mask, rows, ScalarType::Bool, "mask"),
          device.flat<const float>(row_temperature, rows, ScalarType::Float, "row_temperature"),
          static_cast<float>(temperature)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits,
                                                          const Tensor& tokens, double temperature,
                                                          std::optional<Tensor> row_temperature,
                                                          std::optional<Tensor> mask, bool) {
  const OnDevice device(logits);
  const ScoreRows rows = check_rows(device, logits, tokens, temperature, row_temperature, mask);
  const int64_t outer = logits.size(0), inner = logits.size(1);
  Tensor logprobs = torch::stable::new_empty(logits, {outer, inner}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(logits, {outer, inner}, ScalarType::Float);
  Tensor logsumexp = torch::stable::new_empty(logits, {outer, inner}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(logits, {2, outer, inner}, ScalarType::Float);
  const Scores out{data<float>(logprobs), data<float>(entropy), data<float>(logsumexp),
                   data<float>(stats), data<float>(stats) + rows.count};
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_token_logprobs(data<const T>(logits), layout_of(logits), rows, out, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {logprobs, entropy, logsumexp, stats};
}

void gradient_into(const Tensor& grad, const Tensor& logits, const Tensor& tokens,
                   double temperature, const std::optional<Tensor>& row_temperature,
                   const std::optional<Tensor>& mask, const Tensor& entropy, const Tensor& stats,
                   const Tensor& grad_logprobs, const Tensor& grad_entropy,
                   const Tensor& grad_logsumexp) {
  const OnDevice device(logits);
  const ScoreRows rows = check_rows(device, logits, tokens, temperature, row_temperature, mask);
  const auto per_row = [&](const Tensor& x, const char* name, int64_t times = 1) {
    return device.flat<const float>(x, times * rows.count, ScalarType::Float, name);
  };
  const float* row_stats = per_row(stats, "stats", 2);
  const ScoreUpstream upstream{per_row(entropy, "entropy"),
                               row_stats,
                               row_stats + rows.count,
                               per_row(grad_logprobs, "grad_logprobs"),
                               per_row(grad_entropy, "grad_entropy"),
                               per_row(grad_logsumexp, "grad_logsumexp")};
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_token_logprobs_backward(data<const T>(logits), layout_of(logits), data<T>(grad),
                                   layout_of(grad), rows, upstream, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor token_logprobs_backward(const Tensor& logits, const Tensor& tokens, double temperature,
                               std::optional<Tensor> row_temperature, std::optional<Tensor> mask,
                               const Tensor& entropy, const Tensor& stats,
                               const Tensor& grad_logprobs, const Tensor& grad_entropy,
                               const Tensor& grad_logsumexp) {
  Tensor grad = torch::stable::new_empty(logits, logits.sizes());  // contiguous
  gradient_into(grad, logits, tokens, temperature, row_temperature, mask, entropy, stats,
                grad_logprobs, grad_entropy, grad_logsumexp);
  return grad;
}

void token_logprobs_backward_inplace(const Tensor& logits, const Tensor& tokens, double temperature,
                                     std::optional<Tensor> row_temperature,
                                     std::optional<Tensor> mask, const Tensor& entropy,
                                     const Tensor& stats, const Tensor& grad_logprobs,
                                     const Tensor& grad_entropy, const Tensor& grad_logsumexp) {
  gradient_into(logits, logits, tokens, temperature, row_temperature, mask, entropy, stats,
                grad_logprobs, grad_entropy, grad_logsumexp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) {
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
  m.impl("token_logprobs_backward_inplace", TORCH_BOX(&token_logprobs_backward_inplace));
}

}  // namespace pyllmtune
