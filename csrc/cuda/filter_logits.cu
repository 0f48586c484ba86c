// filter_logits: checks, launch and registration of the kernels in filter_logits.cuh.
#include "filter_logits.cuh"
#include "filter_rules.h"

namespace pyllmtune {
namespace {

void check_like(const Tensor& x, const Tensor& like, const char* name) {
  check_rows(x, name);
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index() &&
                      x.scalar_type() == like.scalar_type(),
                  name, " must have the device and dtype of the other tensor");
  for (int64_t axis = 0; axis < 3; ++axis)
    STD_TORCH_CHECK(x.size(axis) == like.size(axis), name, " must have the shape of the other");
}

void filter_into(const Tensor& logits, double temperature, const OptionalTensor& row_temperature,
                 int64_t top_k, const OptionalTensor& row_top_k, double top_p,
                 const OptionalTensor& row_top_p, double min_p, const OptionalTensor& row_min_p,
                 int64_t order, const Tensor& out) {
  const OnDevice device(logits);
  check_rows(logits, "logits");
  check_like(out, logits, "out");
  const int64_t rows = logits.size(0) * logits.size(1);
  const FilterRules rules = filter_rules(device, rows, temperature, row_temperature, top_k,
                                         row_top_k, top_p, row_top_p, min_p, row_min_p, order);
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_filter_logits(data<const T>(logits), layout_of(logits), data<T>(out), layout_of(out),
                         rows, static_cast<int>(logits.size(2)), rules, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor filter_logits(const Tensor& logits, double temperature, OptionalTensor row_temperature,
                     int64_t top_k, OptionalTensor row_top_k, double top_p,
                     OptionalTensor row_top_p, double min_p, OptionalTensor row_min_p,
                     int64_t order) {
  Tensor out = torch::stable::new_empty(logits, logits.sizes());  // contiguous
  filter_into(logits, temperature, row_temperature, top_k, row_top_k, top_p, row_top_p, min_p,
              row_min_p, order, out);
  return out;
}

void filter_logits_out(const Tensor& logits, double temperature, OptionalTensor row_temperature,
                       int64_t top_k, OptionalTensor row_top_k, double top_p,
                       OptionalTensor row_top_p, double min_p, OptionalTensor row_min_p,
                       int64_t order, const Tensor& out) {
  filter_into(logits, temperature, row_temperature, top_k, row_top_k, top_p, row_top_p, min_p,
              row_min_p, order, out);
}

Tensor filter_logits_backward(const Tensor& grad, const Tensor& output, double temperature,
                              OptionalTensor row_temperature) {
  const OnDevice device(output);
  check_rows(output, "output");
  check_like(grad, output, "grad");
  const int64_t rows = output.size(0) * output.size(1);
  const PerRow<float> temperatures{
      static_cast<float>(temperature),
      device.flat<const float>(row_temperature, rows, ScalarType::Float, "row_temperature")};
  Tensor grad_logits = torch::stable::new_empty(output, output.sizes());  // contiguous
  with_element_type(output.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_filter_logits_backward(data<const T>(grad), layout_of(grad), data<const T>(output),
                                  layout_of(output), data<T>(grad_logits), rows,
                                  static_cast<int>(output.size(2)), temperatures, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) {
  m.impl("filter_logits", TORCH_BOX(&filter_logits));
  m.impl("filter_logits_out", TORCH_BOX(&filter_logits_out));
  m.impl("filter_logits_backward", TORCH_BOX(&filter_logits_backward));
}

}  // namespace pyllmtune
