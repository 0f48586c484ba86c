// sample: checks, launch and registration of the kernels in sample.cuh.
#include "filter_rules.h"
#include "sample.cuh"

namespace pyllmtune {
namespace {

using torch::stable::new_empty;

// The ids of the kept tokens, row after row. Waits for the device: their number is a shape.
template <class T>
Tensor kept_ids_of(const OnDevice& device, const Tensor& logits, const SampleInput<T>& in,
                   const SampleResults& out) {
  if (out.rows == 0) return new_empty(logits, {0}, ScalarType::Int);
  Tensor offsets = new_empty(logits, {out.rows + 1}, ScalarType::Long);
  launch_kept_offsets(out.num_kept, out.rows, data<int64_t>(offsets), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  int64_t total = 0;
  STD_CUDA_CHECK(cudaMemcpyAsync(&total, data<const int64_t>(offsets) + out.rows, sizeof total,
                                 cudaMemcpyDeviceToHost, device.stream()));
  STD_CUDA_CHECK(cudaStreamSynchronize(device.stream()));
  Tensor ids = new_empty(logits, {total}, ScalarType::Int);
  launch_kept_ids(in, out.rows, out.cuts, data<const int64_t>(offsets), data<int32_t>(ids),
                  device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return ids;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample(
    const Tensor& logits, double temperature, OptionalTensor row_temperature, int64_t top_k,
    OptionalTensor row_top_k, double top_p, OptionalTensor row_top_p, double min_p,
    OptionalTensor row_min_p, int64_t order, OptionalTensor allowed, OptionalTensor row_indices,
    int64_t num_samples, int64_t seed, OptionalTensor row_seed, int64_t position,
    OptionalTensor row_position, bool logprobs, bool return_stats, bool /*totals*/,
    bool return_kept) {  // one sweep has all sums: totals cost nothing
  const OnDevice device(logits);
  check_rows(logits, "logits");
  const int64_t logits_rows = logits.size(0) * logits.size(1), vocab = logits.size(2);
  const int64_t rows = row_indices ? row_indices->numel() : logits_rows;
  STD_TORCH_CHECK(rows <= kMaxRows, "row_indices must be at most 2^31 - 1, got ", rows);
  STD_TORCH_CHECK(num_samples > 0 && num_samples <= INT32_MAX,
                  "num_samples must be in [1, 2^31), got ", num_samples);
  const auto longs = [&](const OptionalTensor& x, const char* name) {
    return device.flat<const int64_t>(x, rows, ScalarType::Long, name);
  };
  const FilterRules rules = filter_rules(device, rows, temperature, row_temperature, top_k,
                                         row_top_k, top_p, row_top_p, min_p, row_min_p, order);
  const AllowedTokens allowed_tokens = check_allowed(device, allowed, rows, vocab);
  const int64_t* indices = longs(row_indices, "row_indices");
  const PerRow<int64_t> seeds{seed, longs(row_seed, "row_seed")};
  const PerRow<int64_t> positions{position, longs(row_position, "row_position")};

  const int64_t some = return_stats ? rows : 0;
  Tensor tokens = new_empty(logits, {rows, num_samples}, ScalarType::Long);
  Tensor valid = new_empty(logits, {rows}, ScalarType::Bool);
  Tensor scores = new_empty(logits, {logprobs ? 3 : 0, rows, num_samples}, ScalarType::Float);
  Tensor rank = new_empty(logits, {some, num_samples}, ScalarType::Long);
  Tensor num_kept = new_empty(logits, {rows}, ScalarType::Long);
  Tensor kept_mass = new_empty(logits, {some}, ScalarType::Float);
  Tensor entropy = new_empty(logits, {some}, ScalarType::Float);
  Tensor cuts = new_empty(logits, {return_kept ? rows : 0, 2}, ScalarType::Int);
  Tensor kept_ids = new_empty(logits, {0}, ScalarType::Int);
  const SampleResults out{rows,
                          static_cast<int>(num_samples),
                          data<int64_t>(tokens),
                          data<bool>(valid),
                          logprobs ? data<float>(scores) : nullptr,
                          return_stats ? data<int64_t>(rank) : nullptr,
                          data<int64_t>(num_kept),
                          data<float>(kept_mass),
                          data<float>(entropy),
                          return_kept ? data<int32_t>(cuts) : nullptr};
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const SampleInput<T> in{data<const T>(logits),
                            layout_of(logits),
                            logits_rows,
                            static_cast<int>(vocab),
                            allowed_tokens,
                            indices,
                            rules,
                            seeds,
                            positions,
                            static_cast<int>(num_samples)};
    launch_sample(in, out, device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (return_kept) kept_ids = kept_ids_of(device, logits, in, out);
  });
  return {tokens, valid, scores, rank, num_kept, kept_mass, entropy, kept_ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace pyllmtune
