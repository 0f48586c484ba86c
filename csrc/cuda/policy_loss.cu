// policy_loss: checks, launch and registration of the kernels in policy_loss.cuh.
#include <vector>

#include "policy_loss.cuh"
#include "types.h"

namespace pyllmtune {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
    bool token_advantages, const Tensor& offsets, std::optional<Tensor> mask,
    std::optional<Tensor> ref_logprobs, std::optional<Tensor> entropy,
    std::optional<Tensor> weights, double normalizer, std::optional<Tensor> device_normalizer,
    std::vector<int64_t> choices, std::vector<double> constants) {
  const OnDevice device(logprobs);
  const int64_t total = logprobs.numel(), sequences = offsets.numel() - 1;
  STD_TORCH_CHECK(sequences >= 0 && sequences <= INT32_MAX, "offsets must be [sequences + 1]");
  STD_TORCH_CHECK(choices.size() == kPolicyChoices && constants.size() == kPolicyConstants,
                  "choices and constants must be those of a PolicyLossConfig");
  const PolicyConfig config{policy_choices(choices), policy_constants<float>(constants)};
  STD_TORCH_CHECK(config.choose.kl == kNoKl || ref_logprobs, "a KL term needs ref_logprobs");
  const auto floats = [&](const std::optional<Tensor>& x, int64_t numel, const char* name) {
    return device.flat<const float>(x, numel, ScalarType::Float, name);
  };
  const PolicyTokens in{
      total,
      floats(logprobs, total, "logprobs"),
      floats(old_logprobs, total, "old_logprobs"),
      floats(advantages, token_advantages ? total : sequences, "advantages"),
      token_advantages,
      device.flat<const int64_t>(offsets, sequences + 1, ScalarType::Long, "offsets"),
      device.flat<const bool>(mask, total, ScalarType::Bool, "mask"),
      floats(ref_logprobs, total, "ref_logprobs"),
      floats(entropy, total, "entropy"),
      floats(weights, total, "weights")};

  Tensor loss = torch::stable::new_empty(logprobs, {}, ScalarType::Float);
  Tensor scale = torch::stable::new_empty(logprobs, {}, ScalarType::Float);
  Tensor metrics = torch::stable::new_empty(logprobs, {kMetrics}, ScalarType::Double);
  Tensor rows = torch::stable::new_empty(logprobs, {sequences, kMetrics}, ScalarType::Double);
  Tensor grad_logprobs = torch::stable::new_empty(logprobs, {total}, ScalarType::Float);
  Tensor grad_entropy =
      torch::stable::new_empty(logprobs, {entropy ? total : 0}, ScalarType::Float);
  launch_policy_loss(in, config, sequences, static_cast<float>(normalizer),
                     floats(device_normalizer, 1, "normalizer"),
                     {data<float>(grad_logprobs), entropy ? data<float>(grad_entropy) : nullptr},
                     data<double>(rows), data<float>(loss), data<double>(metrics),
                     data<float>(scale), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, metrics, grad_logprobs, grad_entropy, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) { m.impl("policy_loss", TORCH_BOX(&policy_loss)); }

}  // namespace pyllmtune
