// Entry for the kernels of csrc/cuda/beam_step.cuh. dtype: 0 float32, 1 bfloat16, 2 float16.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/beam_step.cuh"
// clang-format on

using namespace pyllmtune;

extern "C" int beam_step(int64_t dtype, const void* logits, int64_t batch, int64_t beams,
                         int64_t vocab, int64_t outer_stride, int64_t inner_stride,
                         const float* beam_scores, double temperature, const float* row_temperature,
                         const bool* flags, const uint32_t* bits, int64_t allowed_per_row,
                         int64_t renormalize, const int64_t* widths, const int64_t* eos,
                         int64_t eos_count, int64_t candidates, int64_t groups, double penalty,
                         float* stats, int32_t* keys, int32_t* ids, int32_t* taken, float* scores,
                         int64_t* tokens, int64_t* parents, bool* is_eos, bool* valid) {
  return emu::guarded([&] {
    const BeamRequest request{static_cast<int>(beams),
                              static_cast<int>(vocab),
                              static_cast<int>(candidates),
                              static_cast<int>(groups),
                              beam_scores,
                              {static_cast<float>(temperature), row_temperature},
                              widths,
                              eos,
                              static_cast<int>(eos_count),
                              static_cast<float>(penalty)};
    const RowLayout layout{static_cast<uint32_t>(beams), outer_stride, inner_stride};
    const auto call = [&](auto element) {
      using T = decltype(element);
      const BeamInput<T> in{static_cast<const T*>(logits),
                            layout,
                            {flags, bits, allowed_per_row != 0},
                            renormalize == 0};
      launch_beam_step(in, batch, request, {stats, keys, ids, taken},
                       {scores, tokens, parents, is_eos, valid}, nullptr);
    };
    if (dtype == 0) call(float());
    if (dtype == 1) call(__nv_bfloat16());
    if (dtype == 2) call(__half());
  });
}
