// beam_step: checks, launch and registration of the kernels in beam_step.cuh.
#include "beam_step.cuh"
#include "filter_rules.h"

namespace pyllmtune {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> beam_step(
    const Tensor& logits, const Tensor& beam_scores, double temperature,
    OptionalTensor row_temperature, OptionalTensor allowed, bool renormalize, OptionalTensor widths,
    OptionalTensor eos_token_ids, int64_t num_candidates, int64_t num_groups,
    double diversity_penalty) {
  const OnDevice device(logits);
  check_rows(logits, "logits");
  const int64_t batch = logits.size(0), beams = logits.size(1), vocab = logits.size(2);
  const int64_t rows = batch * beams;
  STD_TORCH_CHECK(beams > 0 && num_groups > 0 && beams % num_groups == 0 && num_candidates > 0 &&
                      num_candidates % num_groups == 0,
                  "num_groups must divide the beams and num_candidates");
  STD_TORCH_CHECK(num_candidates + beams <= INT32_MAX, "num_candidates must be below 2^31");
  const int64_t eos_count = eos_token_ids ? eos_token_ids->numel() : 0;
  const BeamRequest request{
      static_cast<int>(beams),
      static_cast<int>(vocab),
      static_cast<int>(num_candidates),
      static_cast<int>(num_groups),
      device.flat<const float>(beam_scores, rows, ScalarType::Float, "beam_scores"),
      {static_cast<float>(temperature),
       device.flat<const float>(row_temperature, rows, ScalarType::Float, "row_temperature")},
      device.flat<const int64_t>(widths, batch, ScalarType::Long, "widths"),
      device.flat<const int64_t>(eos_token_ids, eos_count, ScalarType::Long, "eos_token_ids"),
      static_cast<int>(eos_count),
      static_cast<float>(diversity_penalty)};
  const AllowedTokens tokens_allowed = check_allowed(device, allowed, rows, vocab);

  const int64_t parts = rows * request.parts(), kept = request.kept();
  const Tensor stats = new_empty(logits, {parts, 2}, ScalarType::Float);
  const Tensor keys = new_empty(logits, {parts, kept}, ScalarType::Int);
  const Tensor ids = new_empty(logits, {parts, kept}, ScalarType::Int);
  const Tensor taken = new_empty(logits, {batch, beams}, ScalarType::Int);
  Tensor scores = new_empty(logits, {batch, num_candidates}, ScalarType::Float);
  Tensor tokens = new_empty(logits, {batch, num_candidates}, ScalarType::Long);
  Tensor parents = new_empty(logits, {batch, num_candidates}, ScalarType::Long);
  Tensor is_eos = new_empty(logits, {batch, num_candidates}, ScalarType::Bool);
  Tensor valid = new_empty(logits, {batch, beams}, ScalarType::Bool);
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const BeamInput<T> in{data<const T>(logits), layout_of(logits), tokens_allowed, !renormalize};
    launch_beam_step(
        in, batch, request,
        {data<float>(stats), data<int32_t>(keys), data<int32_t>(ids), data<int32_t>(taken)},
        {data<float>(scores), data<int64_t>(tokens), data<int64_t>(parents), data<bool>(is_eos),
         data<bool>(valid)},
        device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {scores, tokens, parents, is_eos, valid};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) { m.impl("beam_step", TORCH_BOX(&beam_step)); }

}  // namespace pyllmtune
