// gae: checks, launch and registration of the kernel in gae.cuh.
#include "gae.cuh"
#include "types.h"

namespace pyllmtune {
namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& offsets,
                               std::optional<Tensor> mask, std::optional<Tensor> terminated,
                               std::optional<Tensor> bootstrap, double gamma, double lam,
                               std::optional<Tensor> sequence_gamma,
                               std::optional<Tensor> sequence_lam, bool carry_masked) {
  const OnDevice device(rewards);
  const int64_t total = rewards.numel(), sequences = offsets.numel() - 1;
  STD_TORCH_CHECK(sequences >= 0 && sequences <= INT32_MAX, "offsets must be [sequences + 1]");
  const auto floats = [&](const std::optional<Tensor>& x, int64_t numel, const char* name) {
    return device.flat<const float>(x, numel, ScalarType::Float, name);
  };
  const GaeInputs in{
      total,
      floats(rewards, total, "rewards"),
      floats(values, total, "values"),
      device.flat<const int64_t>(offsets, sequences + 1, ScalarType::Long, "offsets"),
      device.flat<const bool>(mask, total, ScalarType::Bool, "mask"),
      device.flat<const bool>(terminated, total, ScalarType::Bool, "terminated"),
      floats(bootstrap, sequences, "bootstrap"),
      floats(sequence_gamma, sequences, "gamma"),
      floats(sequence_lam, sequences, "lam"),
      static_cast<float>(gamma),
      static_cast<float>(lam),
      carry_masked};
  Tensor advantages = torch::stable::new_empty(rewards, {total}, ScalarType::Float);
  Tensor returns = torch::stable::new_empty(rewards, {total}, ScalarType::Float);
  launch_gae(in, sequences, data<float>(advantages), data<float>(returns), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace pyllmtune
