// sequences: packed per-token arrays [total], of which sequence i is offsets[i]:offsets[i + 1].
#pragma once

#include <algorithm>

#include "types.h"

namespace pyllmtune {

// The offsets, after a look at all of them.
inline const int64_t* check_offsets(const torch::stable::Tensor& offsets, int64_t total) {
  STD_TORCH_CHECK(offsets.numel() >= 1, "offsets must be [sequences + 1]");
  check_flat(offsets, offsets.numel(), ScalarType::Long, "offsets");
  const auto* begin = data<const int64_t>(offsets);
  STD_TORCH_CHECK(begin[0] == 0 && begin[offsets.numel() - 1] == total,
                  "cu_seqlens must run from 0 to ", total);
  for (int64_t i = 1; i < offsets.numel(); ++i)
    STD_TORCH_CHECK(begin[i - 1] <= begin[i], "cu_seqlens must not decrease, got ", begin[i - 1],
                    " before ", begin[i]);
  return begin;
}

// Tokens for one thread at least: about 5 us of work, what waking a thread costs.
constexpr int64_t kTokenGrain = 2048;

inline int64_t sequence_grain(int64_t sequences, int64_t total) {
  return std::max<int64_t>(1, kTokenGrain * sequences / std::max<int64_t>(total, 1));
}

}  // namespace pyllmtune
