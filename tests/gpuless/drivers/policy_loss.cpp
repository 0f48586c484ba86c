// The entry for the kernels of csrc/cuda/policy_loss.cuh.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/policy_loss.cuh"
// clang-format on

extern "C" int policy_loss(int64_t total, int64_t sequences, const float* logprobs,
                           const float* old_logprobs, const float* advantages,
                           int64_t token_advantages, const int64_t* offsets, const bool* mask,
                           const float* ref_logprobs, const float* entropy, const float* weights,
                           double normalizer, const float* device_normalizer,
                           const int64_t* choices, const double* constants, float* loss,
                           double* metrics, float* grad_logprobs, float* grad_entropy, float* scale,
                           double* rows) {
  using namespace pyllmtune;
  return emu::guarded([&] {
    launch_policy_loss({total, logprobs, old_logprobs, advantages, token_advantages != 0, offsets,
                        mask, ref_logprobs, entropy, weights},
                       {policy_choices(choices), policy_constants<float>(constants)}, sequences,
                       static_cast<float>(normalizer), device_normalizer,
                       {grad_logprobs, grad_entropy}, rows, loss, metrics, scale, nullptr);
  });
}
