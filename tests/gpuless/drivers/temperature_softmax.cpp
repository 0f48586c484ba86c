// Entries for the kernels of csrc/cuda/temperature_softmax.cuh. dtype: 0 float32, 1 bfloat16,
// 2 float16; what is stored has that dtype, or float32.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/temperature_softmax.cuh"
// clang-format on

namespace {

using namespace pyllmtune;

RowLayout layout(int64_t inner, int64_t outer_stride, int64_t inner_stride) {
  return {static_cast<uint32_t>(inner > 0 ? inner : 1), outer_stride, inner_stride};
}

template <class Function>
void with_element_types(int64_t dtype, int64_t stored, const Function& f) {
  if (dtype == 0) f(float(), float());
  if (dtype == 1 && stored == 1) f(__nv_bfloat16(), __nv_bfloat16());
  if (dtype == 2 && stored == 2) f(__half(), __half());
  if (dtype == 1 && stored == 0) f(__nv_bfloat16(), float());
  if (dtype == 2 && stored == 0) f(__half(), float());
}

}  // namespace

extern "C" int temperature_softmax(int64_t dtype, int64_t stored, const void* logits,
                                   int64_t outer_stride, int64_t inner_stride, void* output,
                                   int64_t out_outer_stride, int64_t out_inner_stride, int64_t rows,
                                   int64_t inner, int64_t vocab, double temperature,
                                   const float* row_temperature, int64_t log) {
  return emu::guarded([&] {
    with_element_types(dtype, stored, [&](auto element, auto result) {
      using T = decltype(element);
      using U = decltype(result);
      launch_temperature_softmax(static_cast<const T*>(logits),
                                 layout(inner, outer_stride, inner_stride), static_cast<U*>(output),
                                 layout(inner, out_outer_stride, out_inner_stride),
                                 {rows, static_cast<int>(vocab), row_temperature,
                                  static_cast<float>(temperature), log != 0},
                                 nullptr);
    });
  });
}

extern "C" int temperature_softmax_backward(int64_t dtype, int64_t stored, const void* upstream,
                                            int64_t upstream_outer_stride,
                                            int64_t upstream_inner_stride, const void* output,
                                            int64_t outer_stride, int64_t inner_stride, void* grad,
                                            int64_t grad_outer_stride, int64_t grad_inner_stride,
                                            float* grad_temperature, int64_t rows, int64_t inner,
                                            int64_t vocab, double temperature,
                                            const float* row_temperature, int64_t log) {
  return emu::guarded([&] {
    with_element_types(dtype, stored, [&](auto element, auto result) {
      using T = decltype(element);
      using U = decltype(result);
      launch_temperature_softmax_backward(
          static_cast<const U*>(upstream),
          layout(inner, upstream_outer_stride, upstream_inner_stride),
          static_cast<const U*>(output), layout(inner, outer_stride, inner_stride),
          static_cast<T*>(grad), layout(inner, grad_outer_stride, grad_inner_stride),
          grad_temperature,
          {rows, static_cast<int>(vocab), row_temperature, static_cast<float>(temperature),
           log != 0},
          nullptr);
    });
  });
}
