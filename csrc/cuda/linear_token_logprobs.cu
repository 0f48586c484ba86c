// linear_token_logprobs: checks, launch and registration of the kernels in
// linear_token_logprobs.cuh. The loop over tiles and the matmuls are in
// pyllmtune/ops/linear_tiles.py.
#include "linear_token_logprobs.cuh"
#include "types.h"

namespace pyllmtune {
namespace {

LinearTile check_tile(const OnDevice& device, const Tensor& logits, int64_t first, double scale,
                      double softcap, const std::optional<Tensor>& bias, const Tensor& tokens,
                      double temperature, const std::optional<Tensor>& row_temperature) {
  STD_TORCH_CHECK(
      logits.dim() == 2 && logits.stride(1) == 1 && logits.scalar_type() == ScalarType::Float,
      "logits must be [rows, columns] of float32");
  const int64_t rows = logits.size(0), columns = logits.size(1);
  // 2^24: the backward grid's y axis, and column numbers are int
  STD_TORCH_CHECK(rows <= INT32_MAX && columns <= (1 << 24),
                  "a tile must have at most 2^31 - 1 rows and 2^24 columns, got ", rows, " and ",
                  columns);
  return {data<const float>(logits),
          rows,
          logits.stride(0),
          static_cast<int>(columns),
          first,
          static_cast<float>(scale),
          static_cast<float>(softcap),
          device.flat<const float>(bias, columns, ScalarType::Float, "bias"),
          device.flat<const int64_t>(tokens, rows, ScalarType::Long, "tokens"),
          static_cast<float>(temperature),
          device.flat<const float>(row_temperature, rows, ScalarType::Float, "row_temperature")};
}

void linear_token_logprobs_tile(const Tensor& logits, int64_t first, double scale, double softcap,
                                std::optional<Tensor> bias, const Tensor& tokens,
                                double temperature, std::optional<Tensor> row_temperature,
                                const Tensor& running, const Tensor& scores) {
  const OnDevice device(logits);
  const LinearTile tile =
      check_tile(device, logits, first, scale, softcap, bias, tokens, temperature, row_temperature);
  launch_linear_token_logprobs_tile(
      tile, device.flat<float>(running, 4 * tile.rows, ScalarType::Float, "running"),
      device.flat<float>(scores, 3 * tile.rows, ScalarType::Float, "scores"), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void linear_token_logprobs_tile_backward(const Tensor& logits, int64_t first, double scale,
                                         double softcap, std::optional<Tensor> bias,
                                         const Tensor& tokens, double temperature,
                                         std::optional<Tensor> row_temperature, const Tensor& stats,
                                         const Tensor& upstream, const Tensor& grad) {
  const OnDevice device(logits);
  const LinearTile tile =
      check_tile(device, logits, first, scale, softcap, bias, tokens, temperature, row_temperature);
  const auto per_row = [&](const Tensor& x, const char* name) {
    return device.flat<const float>(x, 3 * tile.rows, ScalarType::Float, name);
  };
  const float *row_stats = per_row(stats, "stats"), *up = per_row(upstream, "upstream");
  STD_TORCH_CHECK(grad.is_cuda() && grad.dim() == 2 && grad.size(0) == tile.rows &&
                      grad.size(1) == tile.columns && grad.stride(1) == 1,
                  "grad must have the shape of logits");
  with_element_type(grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    T* out = data<T>(grad);
    STD_TORCH_CHECK(misalignment(out) == 0 && grad.stride(0) % Chunk<T>::kSize == 0,
                    "rows of grad must begin on 16-byte boundaries");
    launch_linear_token_logprobs_tile_backward(tile, row_stats, up, out, grad.stride(0),
                                               device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CUDA, m) {
  m.impl("linear_token_logprobs_tile", TORCH_BOX(&linear_token_logprobs_tile));
  m.impl("linear_token_logprobs_tile_backward", TORCH_BOX(&linear_token_logprobs_tile_backward));
}

}  // namespace pyllmtune
