// Entries for the kernels of csrc/cuda/linear_token_logprobs.cuh. dtype: 0 float32, 1 bfloat16,
// 2 float16.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/linear_token_logprobs.cuh"
// clang-format on

using namespace pyllmtune;

extern "C" int linear_token_logprobs_tile(const float* logits, int64_t rows, int64_t stride,
                                          int64_t columns, int64_t first, double scale, double cap,
                                          const float* bias, const int64_t* tokens,
                                          double temperature, const float* row_temperature,
                                          float* running, float* scores) {
  return emu::guarded([&] {
    launch_linear_token_logprobs_tile(
        {logits, rows, stride, static_cast<int>(columns), first, static_cast<float>(scale),
         static_cast<float>(cap), bias, tokens, static_cast<float>(temperature), row_temperature},
        running, scores, nullptr);
  });
}

extern "C" int linear_token_logprobs_tile_backward(const float* logits, int64_t rows,
                                                   int64_t stride, int64_t columns, int64_t first,
                                                   double scale, double cap, const float* bias,
                                                   const int64_t* tokens, double temperature,
                                                   const float* row_temperature, const float* stats,
                                                   const float* upstream, int64_t dtype, void* grad,
                                                   int64_t grad_stride) {
  return emu::guarded([&] {
    const auto launch = [&](auto element) {
      using T = decltype(element);
      launch_linear_token_logprobs_tile_backward(
          {logits, rows, stride, static_cast<int>(columns), first, static_cast<float>(scale),
           static_cast<float>(cap), bias, tokens, static_cast<float>(temperature), row_temperature},
          stats, upstream, static_cast<T*>(grad), grad_stride, nullptr);
    };
    if (dtype == 0) launch(float());
    if (dtype == 1) launch(__nv_bfloat16());
    if (dtype == 2) launch(__half());
  });
}
