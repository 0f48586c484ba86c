// The entry for the kernel of csrc/cuda/gae.cuh.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/gae.cuh"
// clang-format on

extern "C" int gae(int64_t total, int64_t sequences, const float* rewards, const float* values,
                   const int64_t* offsets, const bool* mask, const bool* terminated,
                   const float* bootstrap, double gamma, double lam, const float* sequence_gamma,
                   const float* sequence_lam, int64_t carry_masked, float* advantages,
                   float* returns) {
  using namespace pyllmtune;
  return emu::guarded([&] {
    launch_gae(
        {total, rewards, values, offsets, mask, terminated, bootstrap, sequence_gamma, sequence_lam,
         static_cast<float>(gamma), static_cast<float>(lam), carry_masked != 0},
        sequences, advantages, returns, nullptr);
  });
}
