// Entries for the kernels of csrc/cuda/kl_divergence.cuh. dtype: 0 float32, 1 bfloat16, 2 float16.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/kl_divergence.cuh"
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

extern "C" int kl_divergence(int64_t dtype, const void* logits, int64_t outer_stride,
                             int64_t inner_stride, const void* ref_logits, int64_t ref_outer_stride,
                             int64_t ref_inner_stride, int64_t rows, int64_t inner, int64_t vocab,
                             double temperature, const float* row_temperature, const bool* mask,
                             double weight, float* divergence, float* stats) {
  return emu::guarded([&] {
    with_element_type(dtype, [&](auto element) {
      using T = decltype(element);
      launch_kl_divergence(
          PairRows<T>{static_cast<const T*>(logits), static_cast<const T*>(ref_logits),
                      layout(inner, outer_stride, inner_stride),
                      layout(inner, ref_outer_stride, ref_inner_stride), rows,
                      static_cast<int>(vocab), mask, row_temperature,
                      static_cast<float>(temperature), static_cast<float>(weight)},
          Divergences{divergence, stats, rows}, nullptr);
    });
  });
}

extern "C" int kl_divergence_backward(int64_t dtype, const void* logits, int64_t outer_stride,
                                      int64_t inner_stride, const void* ref_logits,
                                      int64_t ref_outer_stride, int64_t ref_inner_stride,
                                      int64_t rows, int64_t inner, int64_t vocab,
                                      double temperature, const float* row_temperature,
                                      const bool* mask, double weight, const float* stats,
                                      const float* upstream, void* grad, void* ref_grad) {
  return emu::guarded([&] {
    with_element_type(dtype, [&](auto element) {
      using T = decltype(element);
      launch_kl_divergence_backward(
          PairRows<T>{static_cast<const T*>(logits), static_cast<const T*>(ref_logits),
                      layout(inner, outer_stride, inner_stride),
                      layout(inner, ref_outer_stride, ref_inner_stride), rows,
                      static_cast<int>(vocab), mask, row_temperature,
                      static_cast<float>(temperature), static_cast<float>(weight)},
          PairGradient<T>{static_cast<T*>(grad), static_cast<T*>(ref_grad),
                          layout(inner, inner * vocab, vocab), stats, upstream},
          nullptr);
    });
  });
}
