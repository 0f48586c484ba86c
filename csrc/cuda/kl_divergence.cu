// kl_divergence: checks, launch and registration of the kernels in kl_divergence.cuh.
#include "kl_divergence.cuh"
#include "types.h"

namespace pyllmtune {
namespace {

// 2^26 columns: column numbers are int, and a row must not need more than 65,535 tiles of 1,024.
constexpr int64_t kMaxVocab = int64_t(1) << 26, kMaxRows = INT32_MAX;

RowLayout layout_of(const Tensor& x) {  // x [outer, inner, V]
  return {static_cast<uint32_t>(x.size(1) > 0 ? x.size(1) : 1), x.stride(0), x.stride(1)};
}

void check_pair(const Tensor& logits, const Tensor& ref_logits) {
  for (const Tensor* x : {&logits, &ref_logits}) {
    STD_TORCH_CHECK(x->dim() == 3 && x->size(2) > 0 && (x->size(2) == 1 || x->stride(2) == 1),
                    "logits must be [outer, inner, V], contiguous along V > 0");
    STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == logits.get_device_index() &&
                        x->scalar_type() == logits.scalar_type() && x->size(0) == logits.size(0) &&
                        x->size(1) == logits.size(1) && x->size(2) == logits.size(2),
                    "ref_logits must have the device, the dtype and the shape of logits");
  }
  STD_TORCH_CHECK(logits.size(2) <= kMaxVocab && logits.size(0) * logits.size(1) <= kMaxRows,
                  "logits must have at most 2^26 columns and 2^31 - 1 rows");
}

template <class T>
PairRows<T> rows_of(const OnDevice& device, const Tensor& logits, const Tensor& ref_logits,
                    double temperature, const std::optional<Tensor>& row_temperature,
                    const std::optional<Tensor>& mask, double js_weight) {
  const int64_t count = logits.size(0) * logits.size(1);
  return {data<const T>(logits),
          data<const T>(ref_logits),
          layout_of(logits),
          layout_of(ref_logits),
          count,
          static_cast<int>(logits.size(2)),
          device.flat<const bool>(mask, count, ScalarType::Bool, "mask"),
          device.flat<const float>(row_temperature, count, ScalarType::Float, "row_temperature"),
          static_cast<float>(temperature),
          static_cast<float>(js_weight)};
}

std::tuple<Tensor, Tensor> kl_divergence(const Tensor& logits, const Tensor& ref_logits,
                                         double temperature, std::optional<Tensor> row_temperature,
                                         std::optional<Tensor> mask, double js_weight) {
  const OnDevice device(logits);
  check_pair(logits, ref_logits);
  const int64_t outer = logits.size(0), inner = logits.size(1);
  Tensor divergence = torch::stable::new_empty(logits, {outer, inner}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(logits, {6, outer, inner}, ScalarType::Float);
  const Divergences out{data<float>(divergence), data<float>(stats), outer * inner};
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_kl_divergence(
        rows_of<T>(device, logits, ref_logits, temperature, row_temperature, mask, js_weight), out,
        device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {divergence, stats};
}

std::tuple<Tensor, Tensor> kl_divergence_backward(const Tensor& logits, const Tensor& ref_logits,
                                                  double temperature,
                                                  std::optional<Tensor> row_temperature,
                                                  std::optional<Tensor> mask, double js_weight,
                                                  const Tensor& stats, const Tensor& grad,
                                                  bool logits_gradient, bool ref_gradient) {
  const OnDevice device(logits);
  check_pair(logits, ref_logits);
  const int64_t count = logits.size(0) * logits.size(1);
  const auto result = [&](bool wanted) {  // contiguous, at the allocator's alignment
    return wanted ? torch::stable::new_empty(logits, logits.sizes())
                  : torch::stable::new_empty(logits, {0, 0, 0});
  };
  Tensor dz = result(logits_gradient), dr = result(ref_gradient);
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_kl_divergence_backward(
        rows_of<T>(device, logits, ref_logits, temperature, row_temperature, mask, js_weight),
        PairGradient<T>{logits_gradient ? data<T>(dz) : nullptr,
                        ref_gradient ? data<T>(dr) : nullptr, layout_of(logits_gradient ? dz : dr),
                        device.flat<const float>(stats, 6 * count, ScalarType::Float, "stats"),
                        device.flat<const float>(grad, count, ScalarType::Float, "grad")},
        device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {dz, dr};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) {
  m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
  m.impl("kl_divergence_backward", TORCH_BOX(&kl_divergence_backward));
}

}  // namespace pyllmtune
