// Entries for the kernels of csrc/cuda/token_logprobs.cuh. dtype: 0 float32, 1 bfloat16, 2 float16.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/token_logprobs.cuh"
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

extern "C" int token_logprobs(int64_t dtype, const void* logits, int64_t rows, int64_t inner,
                              int64_t vocab, int64_t outer_stride, int64_t inner_stride,
                              const int64_t* tokens, double temperature,
                              const float* row_temperature, const bool* mask, float* logprobs,
                              float* entropy, float* logsumexp, float* stats) {
  return emu::guarded([&] {
    with_element_type(dtype, [&](auto element) {
      using T = decltype(element);
      launch_token_logprobs(static_cast<const T*>(logits),
                            layout(inner, outer_stride, inner_stride),
                            {rows, static_cast<int>(vocab), tokens, mask, row_temperature,
                             static_cast<float>(temperature)},
                            {logprobs, entropy, logsumexp, stats, stats + rows}, nullptr);
    });
  });
}

extern "C" int token_logprobs_backward(int64_t dtype, const void* logits, int64_t outer_stride,
                                       int64_t inner_stride, void* grad, int64_t grad_outer_stride,
                                       int64_t grad_inner_stride, int64_t rows, int64_t inner,
                                       int64_t vocab, const int64_t* tokens, double temperature,
                                       const float* row_temperature, const bool* mask,
                                       const float* entropy, const float* stats,
                                       const float* grad_logprobs, const float* grad_entropy,
                                       const float* grad_logsumexp) {
  return emu::guarded([&] {
    with_element_type(dtype, [&](auto element) {
      using T = decltype(element);
      launch_token_logprobs_backward(
          static_cast<const T*>(logits), layout(inner, outer_stride, inner_stride),
          static_cast<T*>(grad), layout(inner, grad_outer_stride, grad_inner_stride),
          {rows, static_cast<int>(vocab), tokens, mask, row_temperature,
           static_cast<float>(temperature)},
          {entropy, stats, stats + rows, grad_logprobs, grad_entropy, grad_logsumexp}, nullptr);
    });
  });
}
