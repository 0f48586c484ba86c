// matmul: C (+)= A B of strided operands, accumulated and returned in float32 (float64 for
// float64).
//
//   A [M, K], B [K, N] of any strides, float32, bfloat16, float16 or float64 -> C [M, N], rows of
//   unit stride
//
// K is cut into blocks at fixed places; a block of an element of C is one chain of multiply-adds in
// the order of k, and blocks are added in order. So C has the same bits however M and N are cut,
// for any number of rows and threads. bfloat16 products are exact in float32; where the CPU
// multiplies pairs of bfloat16 (two products and the sum in one instruction) pairs are chained
// instead, twice as fast, with other bits and subnormal numbers taken as 0.
//
// Method: a panel of kColumns columns of B and one of kRows rows of A lie in the first-level cache,
// interleaved by k; a tile of C lies in registers. Blocks are packed by the thread that uses them.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "types.h"

namespace pyllmtune {

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

template <class V, class Unit>
PLT_PAIR_TARGET inline V multiply_add(Unit a, const Unit* b, V sum) {
  if constexpr (std::is_same_v<Unit, Bf16Pair>)
    return add_pair_products(sum, a.bits, &b->bits);
  else
    return fma_of(V(a), load(b), sum);
}

// The tile of C that stays in registers, by the number of registers there are (simd_*.h).
template <class V>
constexpr int kTileRows = V::kWidth == 1 ? 4 : kMatmulRows;
template <class V>
constexpr int kTileVectors = V::kWidth == 1 ? 4 : kMatmulVectors;
template <class V>
constexpr int kTileColumns = kTileVectors<V> * V::kWidth;

// One tile of C over `depth` units of k. a [depth, kTileRows], b [depth, kTileColumns].
template <class V, class Unit>
PLT_PAIR_TARGET void multiply_tile(const Unit* a, const Unit* b, int64_t depth,
                                   typename V::Scalar* c, int64_t stride, int rows, int columns,
                                   bool add) {
  constexpr int kRows = kTileRows<V>, kVectors = kTileVectors<V>, kColumns = kTileColumns<V>;
  V sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = V(0);
  for (int64_t k = 0; k < depth; ++k, a += kRows, b += kColumns) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        sum[i][j] = multiply_add<V>(a[i], b + j * V::kWidth, sum[i][j]);
  }
  if (rows == kRows && columns == kColumns) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        typename V::Scalar* p = c + i * stride + j * V::kWidth;
        store(p, add ? load(p) + sum[i][j] : sum[i][j]);
      }
    return;
  }
  typename V::Scalar whole[kRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(&whole[i][j * V::kWidth], sum[i][j]);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j)
      c[i * stride + j] = add ? c[i * stride + j] + whole[i][j] : whole[i][j];
}

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

// 128 numbers: twice as many cost no time either way, but a chain of them rounds more often than
// other libraries' products do. A panel of B then takes a third of a first-level cache.
template <class Unit>
constexpr int64_t kBlockDepth = 512 / sizeof(Unit) * kDepth<Unit>;
constexpr int64_t kBlockRows = 384, kBlockColumns = 512;  // packed: 192 and 256 KiB, a second level

template <class Unit, class T, class F>
void multiply_block(Operand<T> a, Operand<T> b, F* c, int64_t stride, int64_t rows, int64_t columns,
                    int64_t inner, bool add) {
  using V = typename VectorOf<T>::type;
  constexpr int kRows = kTileRows<V>, kColumns = kTileColumns<V>;
  static thread_local std::vector<Unit> packed_a, packed_b;
  const int64_t most = std::min(inner, kBlockDepth<Unit>) / kDepth<Unit> + 1;
  packed_a.resize((std::min(rows, kBlockRows) + kRows) * most + 16);
  packed_b.resize((columns + kColumns) * most + 16);
  for (int64_t k = 0; k < inner; k += kBlockDepth<Unit>) {
    const int64_t block = std::min(kBlockDepth<Unit>, inner - k);
    const int64_t depth = (block + kDepth<Unit> - 1) / kDepth<Unit>;
    const Operand<T> bt = b.transposed();
    pack<kColumns>(Operand<T>{bt.at + k * bt.column_stride, bt.row_stride, bt.column_stride},
                   columns, block, packed_b.data());
    for (int64_t i0 = 0; i0 < rows; i0 += kBlockRows) {
      const int64_t height = std::min(kBlockRows, rows - i0);
      pack<kRows>(
          Operand<T>{a.at + i0 * a.row_stride + k * a.column_stride, a.row_stride, a.column_stride},
          height, block, packed_a.data());
      for (int64_t j = 0; j < columns; j += kColumns)
        for (int64_t i = 0; i < height; i += kRows)
          multiply_tile<V>(packed_a.data() + i * depth, packed_b.data() + j * depth, depth,
                           c + (i0 + i) * stride + j, stride,
                           static_cast<int>(std::min<int64_t>(kRows, height - i)),
                           static_cast<int>(std::min<int64_t>(kColumns, columns - j)),
                           add || k > 0);
    }
  }
}

template <class T, class F>
void multiply(Operand<T> a, Operand<T> b, F* c, int64_t stride, int64_t rows, int64_t columns,
              int64_t inner, bool add) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  int64_t height = 2 * kBlockRows, width = kBlockColumns;  // of the part of C of one task
  while (parts(rows, height) * parts(columns, width) < 2 * threads && height * width > 96 * 128)
    (height > width ? height : width) /= 2;
  const int64_t across = parts(columns, width);
  parallel_for(parts(rows, height) * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / across * height, j = task % across * width;
      const auto run = [&](auto unit) {
        multiply_block<decltype(unit)>(
            Operand<T>{a.at + i * a.row_stride, a.row_stride, a.column_stride},
            Operand<T>{b.at + j * b.column_stride, b.row_stride, b.column_stride},
            c + i * stride + j, stride, std::min(height, rows - i), std::min(width, columns - j),
            inner, add);
      };
      if constexpr (std::is_same_v<T, Bf16>)
        if (multiplies_pairs()) {
          run(Bf16Pair());
          continue;
        }
      run(F());
    }
  });
}

}  // namespace pyllmtune
