// Operands of a product, and how they are packed.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"
#include "types.h"

namespace pyllmtune {

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T>
struct Operand {
  const T* at;
  int64_t row_stride, column_stride;

  Operand transposed() const { return {at, column_stride, row_stride}; }
};

// What one step along k multiplies: a number, or a pair of bfloat16.
struct Bf16Pair {
  uint32_t bits;
};
template <class Unit>
constexpr int kDepth = std::is_same_v<Unit, Bf16Pair> ? 2 : 1;  // elements of k in a unit

template <class Unit, class T>
Unit unit_at(const T* p, int64_t stride, int64_t left) {
  if constexpr (std::is_same_v<Unit, Bf16Pair>)
    return {p[0].bits | (left > 1 ? static_cast<uint32_t>(p[stride].bits) << 16 : 0)};
  else
    return to_scalar(*p);
}

// Sixteen units along k of one row, which has them side by side.
template <class Unit, class T>
F32x16 load_units(const T* p) {
  if constexpr (std::is_same_v<Unit, Bf16Pair>)
    return load(reinterpret_cast<const float*>(p));
  else
    return load(p);
}

// Rows of x, k along its columns, as panels of `width` rows: out [panels, depth, width], zeros
// where the last panel is not full. Sixteen units past the end may be written.
template <int kWidth, class Unit, class T>
void pack(Operand<T> x, int64_t rows, int64_t columns, Unit* out) {
  const int64_t depth = (columns + kDepth<Unit> - 1) / kDepth<Unit>;
  for (int64_t first = 0; first < rows; first += kWidth, out += depth * kWidth) {
    const int here = static_cast<int>(std::min<int64_t>(kWidth, rows - first));
    const T* panel = x.at + first * x.row_stride;
    int64_t k = 0;
    if constexpr (sizeof(Unit) == 4)
      if (x.column_stride == 1) {
        const int64_t whole = columns / kDepth<Unit> / 16 * 16;
        // lanes beyond the panel are covered by the next store, so k goes up
        for (int from = 0; from < kWidth; from += 16)
          for (k = 0; k < whole; k += 16) {
            F32x16 block[16];
            for (int i = 0; i < 16; ++i)
              block[i] =
                  from + i < here
                      ? load_units<Unit>(panel + (from + i) * x.row_stride + k * kDepth<Unit>)
                      : F32x16(0.0f);
            transpose(block);
            for (int i = 0; i < 16; ++i)
              store(reinterpret_cast<float*>(out + (k + i) * kWidth + from), block[i]);
          }
        k = whole;
      }
    for (; k < depth; ++k) {
      const T* p = panel + k * kDepth<Unit> * x.column_stride;
      const int64_t left = columns - k * kDepth<Unit>;
      Unit* to = out + k * kWidth;
      if (here == kWidth && x.row_stride == 1)  // the compiler's vectors
        for (int i = 0; i < kWidth; ++i) to[i] = unit_at<Unit>(p + i, x.column_stride, left);
      else
        for (int i = 0; i < kWidth; ++i)
          to[i] = i < here ? unit_at<Unit>(p + i * x.row_stride, x.column_stride, left) : Unit{};
    }
  }
}

}  // namespace pyllmtune
