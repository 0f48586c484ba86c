// The entry for the kernels of csrc/cuda/policy_loss.cuh.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/policy_loss.cuh"
// clang-format on

extern "C" int policy_loss(int64_t total, int64_t sequences, const float* logprobs,
                           const float* old_logprobs, const float* advantages,
                           int64_t token_advantages, const int64_t* offsets, const bool* mask,
                           const float* ref_logprobs, const float* entropy, const float* weights,
                           double normalizer, const float* device_normalizer, int64_t level,
                           int64_t rule, int64_t kl, int64_t aggregation, double low, double high,
                           double cap, double kl_coef, double entropy_coef, float* loss,
                           double* metrics, float* grad_logprobs, float* grad_entropy, float* scale,
                           double* rows) {
  using namespace pyllmtune;
  const auto number = [](double x) { return static_cast<float>(x); };
  const auto code = [](int64_t x) { return static_cast<int>(x); };
  return emu::guarded([&] {
    launch_policy_loss({total, logprobs, old_logprobs, advantages, token_advantages != 0, offsets,
                        mask, ref_logprobs, entropy, weights},
                       {code(level), code(rule), code(kl), code(aggregation), number(low),
                        number(high), number(cap), number(kl_coef), number(entropy_coef)},
                       sequences, number(normalizer), device_normalizer,
                       {grad_logprobs, grad_entropy}, rows, loss, metrics, scale, nullptr);
  });
}
