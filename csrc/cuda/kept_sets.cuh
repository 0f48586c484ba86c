// kept_sets: the kept tokens of some rows, one after the other (pyllmtune/kept.py).
#pragma once

#include "block.cuh"

namespace pyllmtune {

struct KeptSets {
  int64_t rows, entries;
  const int64_t* offsets;  // [rows + 1]: row i has the entries offsets[i] ... offsets[i + 1]
  const int32_t* ids;      // [entries]

  // Nobody has looked at the offsets.
  __device__ bool in_bounds(int64_t row) const {
    return 0 <= offsets[row] && offsets[row] <= offsets[row + 1] && offsets[row + 1] <= entries;
  }
};

}  // namespace pyllmtune
