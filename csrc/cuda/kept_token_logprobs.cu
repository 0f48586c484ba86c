// kept_token_logprobs: checks, launch and registration of the kernels in kept_token_logprobs.cuh.
#include "kept_token_logprobs.cuh"
#include "types.h"

namespace pyllmtune {
namespace {

template <class T>
KeptEntries<T> entries_of(const Tensor& x) {  // x [outer, inner, V] or [entries]
  if (x.dim() == 1) return {data<T>(x), true, {1, 0, 0}};
  const auto inner = static_cast<uint32_t>(x.size(1) > 0 ? x.size(1) : 1);
  return {data<T>(x), false, {inner, x.stride(0), x.stride(1)}};
}

KeptRows check_rows(const OnDevice& device, const Tensor& logits, const Tensor& offsets,
                    const Tensor& token_ids, const Tensor& tokens, double temperature,
                    const std::optional<Tensor>& row_temperature,
                    const std::optional<Tensor>& mask) {
  const bool flat = logits.dim() == 1;
  STD_TORCH_CHECK(flat || logits.dim() == 3, "logits must be [outer, inner, V] or [entries]");
  const int64_t rows = tokens.numel(), entries = token_ids.numel();
  STD_TORCH_CHECK(logits.size(-1) <= 1 || logits.stride(-1) == 1,
                  "logits must be contiguous along their last axis");
  STD_TORCH_CHECK(flat ? logits.numel() == entries : logits.size(0) * logits.size(1) == rows,
                  "logits must have one entry a token id, or one row a token");
  STD_TORCH_CHECK(rows <= INT32_MAX && (flat || logits.size(2) <= INT32_MAX),
                  "there must be at most 2^31 - 1 rows and columns");
  return {
      {rows, flat ? INT32_MAX : static_cast<int>(logits.size(2)),
       device.flat<const int64_t>(tokens, rows, ScalarType::Long, "tokens"),
       device.flat<const bool>(mask, rows, ScalarType::Bool, "mask"),
       device.flat<const float>(row_temperature, rows, ScalarType::Float, "row_temperature"),
       static_cast<float>(temperature)},
      {rows, entries, device.flat<const int64_t>(offsets, rows + 1, ScalarType::Long, "offsets"),
       device.flat<const int32_t>(token_ids, entries, ScalarType::Int, "token_ids")}};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kept_token_logprobs(
    const Tensor& logits, const Tensor& offsets, const Tensor& token_ids, const Tensor& tokens,
    double temperature, std::optional<Tensor> row_temperature, std::optional<Tensor> mask) {
  const OnDevice device(logits);
  const KeptRows rows =
      check_rows(device, logits, offsets, token_ids, tokens, temperature, row_temperature, mask);
  const int64_t count = rows.score.count;
  Tensor logprobs = torch::stable::new_empty(logits, {count}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(logits, {count}, ScalarType::Float);
  Tensor logsumexp = torch::stable::new_empty(logits, {count}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(logits, {2, count}, ScalarType::Float);
  const Scores out{data<float>(logprobs), data<float>(entropy), data<float>(logsumexp),
                   data<float>(stats), data<float>(stats) + count};
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_kept_token_logprobs(entries_of<const T>(logits), rows, out, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {logprobs, entropy, logsumexp, stats};
}

Tensor kept_token_logprobs_backward(const Tensor& logits, const Tensor& offsets,
                                    const Tensor& token_ids, const Tensor& tokens,
                                    double temperature, std::optional<Tensor> row_temperature,
                                    std::optional<Tensor> mask, const Tensor& entropy,
                                    const Tensor& stats, const Tensor& grad_logprobs,
                                    const Tensor& grad_entropy, const Tensor& grad_logsumexp) {
  const OnDevice device(logits);
  const KeptRows rows =
      check_rows(device, logits, offsets, token_ids, tokens, temperature, row_temperature, mask);
  const auto per_row = [&](const Tensor& x, const char* name, int64_t times = 1) {
    return device.flat<const float>(x, times * rows.score.count, ScalarType::Float, name);
  };
  const float* row_stats = per_row(stats, "stats", 2);
  const ScoreUpstream upstream{
      per_row(entropy, "entropy"),           row_stats,
      row_stats + rows.score.count,          per_row(grad_logprobs, "grad_logprobs"),
      per_row(grad_entropy, "grad_entropy"), per_row(grad_logsumexp, "grad_logsumexp")};
  Tensor grad = torch::stable::new_zeros(logits, logits.sizes());  // contiguous
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_kept_token_logprobs_backward(entries_of<const T>(logits), entries_of<T>(grad), rows,
                                        upstream, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) {
  m.impl("kept_token_logprobs", TORCH_BOX(&kept_token_logprobs));
  m.impl("kept_token_logprobs_backward", TORCH_BOX(&kept_token_logprobs_backward));
}

}  // namespace pyllmtune
