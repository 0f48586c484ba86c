// Entries for the kernels of csrc/cuda/filter_logits.cuh. dtype: 0 float32, 1 bfloat16, 2 float16.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/filter_logits.cuh"
// clang-format on

namespace {

using namespace pyllmtune;

RowLayout layout(int64_t inner, int64_t outer_stride, int64_t inner_stride) {
  return {static_cast<uint32_t>(inner > 0 ? inner : 1), outer_stride, inner_stride};
}

template <class Function>
void with_element_type(int64_t dtype, const Function& f) {
  if (dtype == 0) f(float());
  if (dtype == 1) f(__nv_bfloat16());
  if (dtype == 2) f(__half());
}

}  // namespace

extern "C" int filter_logits(int64_t dtype, const void* logits, int64_t outer_stride,
                             int64_t inner_stride, void* out, int64_t out_outer_stride,
                             int64_t out_inner_stride, int64_t rows, int64_t inner, int64_t vocab,
                             double temperature, const float* row_temperature, int64_t top_k,
                             const int64_t* row_top_k, double top_p, const double* row_top_p,
                             double min_p, const float* row_min_p, int64_t order) {
  return emu::guarded([&] {
    with_element_type(dtype, [&](auto element) {
      using T = decltype(element);
      launch_filter_logits(static_cast<const T*>(logits), layout(inner, outer_stride, inner_stride),
                           static_cast<T*>(out), layout(inner, out_outer_stride, out_inner_stride),
                           rows, static_cast<int>(vocab),
                           {{static_cast<float>(temperature), row_temperature},
                            {top_k, row_top_k},
                            {top_p, row_top_p},
                            {static_cast<float>(min_p), row_min_p},
                            static_cast<int>(order)},
                           nullptr);
    });
  });
}

extern "C" int filter_logits_backward(int64_t dtype, const void* grad, int64_t outer_stride,
                                      int64_t inner_stride, const void* output,
                                      int64_t output_outer_stride, int64_t output_inner_stride,
                                      void* grad_logits, int64_t rows, int64_t inner, int64_t vocab,
                                      double temperature, const float* row_temperature) {
  return emu::guarded([&] {
    with_element_type(dtype, [&](auto element) {
      using T = decltype(element);
      launch_filter_logits_backward<T>(
          static_cast<const T*>(grad), layout(inner, outer_stride, inner_stride),
          static_cast<const T*>(output), layout(inner, output_outer_stride, output_inner_stride),
          static_cast<T*>(grad_logits), rows, static_cast<int>(vocab),
          {static_cast<float>(temperature), row_temperature}, nullptr);
    });
  });
}
