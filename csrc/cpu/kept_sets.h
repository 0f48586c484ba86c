// kept_sets: the kept tokens of some rows, one after the other (pyllmtune/kept.py).
#pragma once

#include <algorithm>

#include "rows.h"
#include "types.h"

namespace pyllmtune {

struct KeptSets {
  int64_t rows, entries;
  const int64_t* offsets;  // [rows + 1]: row i has the entries offsets[i] ... offsets[i + 1]
  const int32_t* ids;      // [entries]

  // Rows of a thread, if an entry takes `cost` as long as an element of a stripe.
  int64_t grain(int64_t cost) const {
    return std::max<int64_t>(1, kStripe * rows / (entries * cost + rows));
  }
};

inline KeptSets check_kept(const torch::stable::Tensor& offsets,
                           const torch::stable::Tensor& token_ids, int64_t rows, int64_t vocab) {
  const int64_t entries = token_ids.numel();
  check_flat(offsets, rows + 1, ScalarType::Long, "offsets");
  check_flat(token_ids, entries, ScalarType::Int, "token_ids");
  const KeptSets kept{rows, entries, data<const int64_t>(offsets), data<const int32_t>(token_ids)};
  STD_TORCH_CHECK(kept.offsets[0] == 0 && kept.offsets[rows] == entries,
                  "offsets must lead from 0 to the number of token ids");
  for (int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK(kept.offsets[row] <= kept.offsets[row + 1], "offsets must not fall");
  for (int64_t entry = 0; entry < entries; ++entry)
    STD_TORCH_CHECK(kept.ids[entry] >= 0 && kept.ids[entry] < vocab, "token_ids must be in [0, ",
                    vocab, "), got ", kept.ids[entry]);
  return kept;
}

}  // namespace pyllmtune
