// temperature_softmax: checks, launch and registration of the kernels in temperature_softmax.cuh.
#include "temperature_softmax.cuh"
#include "types.h"

namespace pyllmtune {
namespace {

// 2^27 columns: column numbers are int, also a few chunks behind the row.
constexpr int64_t kMaxVocab = int64_t(1) << 27, kMaxRows = INT32_MAX;

RowLayout layout_of(const Tensor& x) {  // x [outer, inner, V]
  return {static_cast<uint32_t>(x.size(1) > 0 ? x.size(1) : 1), x.stride(0), x.stride(1)};
}

SoftmaxRows check_rows(const OnDevice& device, const Tensor& x, double temperature,
                       const std::optional<Tensor>& row_temperature, bool log) {
  STD_TORCH_CHECK(x.dim() == 3, "logits must be [outer, inner, V]");
  const int64_t rows = x.size(0) * x.size(1), vocab = x.size(2);
  STD_TORCH_CHECK(vocab > 0 && (vocab == 1 || x.stride(2) == 1),
                  "logits must be contiguous along V > 0");
  STD_TORCH_CHECK(vocab <= kMaxVocab && rows <= kMaxRows,
                  "logits must have at most 2^27 columns and 2^31 - 1 rows, got ", vocab, " and ",
                  rows);
  STD_TORCH_CHECK(temperature >= 0.0 && temperature < INFINITY,
                  "temperature must be at least 0 and finite, got ", temperature);
  return {rows, static_cast<int>(vocab),
          device.flat<const float>(row_temperature, rows, ScalarType::Float, "row_temperature"),
          static_cast<float>(temperature), log};
}

void check_same(const Tensor& x, const Tensor& like, const char* name) {
  bool same = x.is_cuda() && x.get_device_index() == like.get_device_index() && x.dim() == 3;
  for (int64_t axis = 0; same && axis < 3; ++axis) same = x.size(axis) == like.size(axis);
  STD_TORCH_CHECK(same && (x.size(2) == 1 || x.stride(2) == 1), name,
                  " must have the shape and device of the logits and be contiguous along V");
}

// f(T(), U()): U is what is stored, T or float32.
template <class Function>
void with_element_types(ScalarType dtype, ScalarType stored, const Function& f) {
  with_element_type(dtype, [&](auto element) {
    if (stored == dtype) return f(element, element);
    STD_TORCH_CHECK(stored == ScalarType::Float,
                    "the result must have the dtype of the logits or float32");
    if constexpr (sizeof(element) == 2) f(element, float());
  });
}

void softmax_into(const Tensor& out, const Tensor& logits, double temperature,
                  const std::optional<Tensor>& row_temperature, bool log) {
  const OnDevice device(logits);
  const SoftmaxRows rows = check_rows(device, logits, temperature, row_temperature, log);
  check_same(out, logits, "out");
  with_element_types(logits.scalar_type(), out.scalar_type(), [&](auto element, auto stored) {
    using T = decltype(element);
    using U = decltype(stored);
    launch_temperature_softmax(data<const T>(logits), layout_of(logits), data<U>(out),
                               layout_of(out), rows, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor temperature_softmax(const Tensor& logits, double temperature,
                           std::optional<Tensor> row_temperature, bool log, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(logits, logits.sizes(), dtype);  // contiguous
  softmax_into(out, logits, temperature, row_temperature, log);
  return out;
}

void temperature_softmax_out(const Tensor& logits, double temperature,
                             std::optional<Tensor> row_temperature, bool log, const Tensor& out) {
  softmax_into(out, logits, temperature, row_temperature, log);
}

std::tuple<Tensor, Tensor> temperature_softmax_backward(const Tensor& grad, const Tensor& output,
                                                        double temperature,
                                                        std::optional<Tensor> row_temperature,
                                                        bool log, ScalarType dtype,
                                                        bool temperature_gradient) {
  const OnDevice device(output);
  const SoftmaxRows rows = check_rows(device, output, temperature, row_temperature, log);
  check_same(grad, output, "grad");
  STD_TORCH_CHECK(grad.scalar_type() == output.scalar_type(),
                  "grad must have the dtype of the output");
  Tensor out = torch::stable::new_empty(output, output.sizes(), dtype);
  Tensor by_temperature = torch::stable::new_empty(
      output,
      {temperature_gradient ? output.size(0) : 0, temperature_gradient ? output.size(1) : 0},
      ScalarType::Float);
  with_element_types(dtype, output.scalar_type(), [&](auto element, auto stored) {
    using T = decltype(element);
    using U = decltype(stored);
    launch_temperature_softmax_backward(
        data<const U>(grad), layout_of(grad), data<const U>(output), layout_of(output),
        data<T>(out), layout_of(out), temperature_gradient ? data<float>(by_temperature) : nullptr,
        rows, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, by_temperature};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) {
  m.impl("temperature_softmax", TORCH_BOX(&temperature_softmax));
  m.impl("temperature_softmax_out", TORCH_BOX(&temperature_softmax_out));
  m.impl("temperature_softmax_backward", TORCH_BOX(&temperature_softmax_backward));
}

}  // namespace pyllmtune
