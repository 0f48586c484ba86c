// filter_rules: checks that the decoding ops share: the logits, the allowed tokens, the filters of
// each row.
#pragma once

#include "row_filter.cuh"
#include "types.h"

namespace pyllmtune {

using OptionalTensor = std::optional<Tensor>;

// 2^27 columns: column numbers are int, and a row must not need more than 65,535 tiles.
constexpr int64_t kMaxVocab = int64_t(1) << 27, kMaxRows = INT32_MAX;

inline RowLayout layout_of(const Tensor& x) {  // x [outer, inner, V]
  return {static_cast<uint32_t>(x.size(1) > 0 ? x.size(1) : 1), x.stride(0), x.stride(1)};
}

inline void check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must be [outer, inner, V]");
  const int64_t rows = x.size(0) * x.size(1), vocab = x.size(2);
  STD_TORCH_CHECK(vocab > 0 && (vocab == 1 || x.stride(2) == 1), name,
                  " must be contiguous along V > 0");
  STD_TORCH_CHECK(vocab <= kMaxVocab && rows <= kMaxRows, name,
                  " must have at most 2^27 columns and 2^31 - 1 rows, got ", vocab, " and ", rows);
}

inline AllowedTokens check_allowed(const OnDevice& device, const OptionalTensor& allowed,
                                   int64_t rows, int64_t vocab) {
  if (!allowed) return {nullptr, nullptr, false};
  const bool flags = allowed->scalar_type() == ScalarType::Bool;
  const int64_t width = flags ? vocab : (vocab + 31) / 32;
  STD_TORCH_CHECK(allowed->dim() == 2 && allowed->size(1) == width &&
                      (allowed->size(0) == rows || allowed->size(0) == 1),
                  "allowed must be [rows or 1, ", width, "]");
  const int64_t numel = allowed->numel();
  const bool per_row = allowed->size(0) > 1;
  if (flags)
    return {device.flat<const bool>(*allowed, numel, ScalarType::Bool, "allowed"), nullptr,
            per_row};
  return {nullptr, device.flat<const uint32_t>(*allowed, numel, ScalarType::Int, "allowed"),
          per_row};
}

inline FilterRules filter_rules(const OnDevice& device, int64_t rows, double temperature,
                                const OptionalTensor& row_temperature, int64_t top_k,
                                const OptionalTensor& row_top_k, double top_p,
                                const OptionalTensor& row_top_p, double min_p,
                                const OptionalTensor& row_min_p, int64_t order) {
  STD_TORCH_CHECK(order >= kOrderHf && order <= kOrderJoint, "order must be 0 to 3, got ", order);
  return {{static_cast<float>(temperature),
           device.flat<const float>(row_temperature, rows, ScalarType::Float, "row_temperature")},
          {top_k, device.flat<const int64_t>(row_top_k, rows, ScalarType::Long, "row_top_k")},
          {top_p, device.flat<const double>(row_top_p, rows, ScalarType::Double, "row_top_p")},
          {static_cast<float>(min_p),
           device.flat<const float>(row_min_p, rows, ScalarType::Float, "row_min_p")},
          static_cast<int>(order)};
}

}  // namespace pyllmtune
