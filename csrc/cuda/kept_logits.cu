// kept_logits: checks, launch and registration of the kernels in kept_logits.cuh.
#include "kept_logits.cuh"
#include "types.h"

namespace pyllmtune {
namespace {

// 2^27 columns: column numbers are int, and a row must not need more than 65,535 blocks.
constexpr int64_t kMaxSize = int64_t(1) << 27;

template <class T>
const T* matrix(const OnDevice& device, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must be [n, D]");
  return device.flat<const T>(x, x.numel(), x.scalar_type(), name);
}

Head check_head(const Tensor& hidden, const Tensor& weight) {
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type() && hidden.size(1) == weight.size(1),
                  "hidden and weight must have one dtype and D");
  STD_TORCH_CHECK(weight.size(1) > 0 && weight.size(1) <= kMaxSize && weight.size(0) <= INT32_MAX,
                  "weight must be [V, D] with D from 1 to 2^27 and V below 2^31");
  return {static_cast<int>(weight.size(0)), static_cast<int>(weight.size(1))};
}

KeptSets check_kept(const OnDevice& device, const Tensor& offsets, const Tensor& token_ids,
                    int64_t rows) {
  const int64_t entries = token_ids.numel();
  STD_TORCH_CHECK(rows <= INT32_MAX && entries <= INT32_MAX,
                  "there must be fewer than 2^31 rows and kept tokens");
  return {rows, entries, device.flat<const int64_t>(offsets, rows + 1, ScalarType::Long, "offsets"),
          device.flat<const int32_t>(token_ids, entries, ScalarType::Int, "token_ids")};
}

Tensor kept_logits(const Tensor& hidden, const Tensor& weight, const Tensor& offsets,
                   const Tensor& token_ids, std::optional<Tensor> mask) {
  const OnDevice device(hidden);
  const KeptSets kept = check_kept(device, offsets, token_ids, hidden.size(0));
  Tensor logits = torch::stable::new_empty(hidden, {kept.entries}, ScalarType::Float);
  with_element_type(hidden.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* h = matrix<T>(device, hidden, "hidden");
    const T* w = matrix<T>(device, weight, "weight");
    launch_kept_logits(h, w, check_head(hidden, weight), kept,
                       device.flat<const bool>(mask, kept.rows, ScalarType::Bool, "mask"),
                       data<float>(logits), device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return logits;
}

Tensor kept_logits_backward_hidden(const Tensor& grad, const Tensor& weight, const Tensor& offsets,
                                   const Tensor& token_ids) {
  const OnDevice device(weight);
  const KeptSets kept = check_kept(device, offsets, token_ids, offsets.numel() - 1);
  const auto* g = device.flat<const float>(grad, kept.entries, ScalarType::Float, "grad");
  Tensor out = torch::stable::new_empty(weight, {kept.rows, weight.size(1)});
  with_element_type(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* w = matrix<T>(device, weight, "weight");
    launch_kept_logits_backward_hidden(g, w, check_head(weight, weight), kept, data<T>(out),
                                       device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor kept_logits_backward_weight(const Tensor& grad, const Tensor& rows, const Tensor& token_ids,
                                   const Tensor& hidden, const Tensor& weight) {
  const OnDevice device(weight);
  const int64_t entries = token_ids.numel();
  STD_TORCH_CHECK(entries <= INT32_MAX, "there must be fewer than 2^31 kept tokens");
  const auto* g = device.flat<const float>(grad, entries, ScalarType::Float, "grad");
  const auto* row = device.flat<const int64_t>(rows, entries, ScalarType::Long, "rows");
  const auto* id = device.flat<const int32_t>(token_ids, entries, ScalarType::Int, "token_ids");
  Tensor out = torch::stable::new_zeros(weight, weight.sizes());
  with_element_type(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* h = matrix<T>(device, hidden, "hidden");
    launch_kept_logits_backward_weight(g, row, id, entries, h, check_head(hidden, weight),
                                       data<T>(out), device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) {
  m.impl("kept_logits", TORCH_BOX(&kept_logits));
  m.impl("kept_logits_backward_hidden", TORCH_BOX(&kept_logits_backward_hidden));
  m.impl("kept_logits_backward_weight", TORCH_BOX(&kept_logits_backward_weight));
}

}  // namespace pyllmtune
