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
// instead, twice as fast, with other bits and subnormal numbers taken as 0; where it has tile
// registers these do the same (matmul_amx.h).
//
// Method: a panel of kColumns columns of B and one of kRows rows of A lie in the first-level cache,
// interleaved by k; a tile of C lies in registers. Blocks are packed by the thread that uses them.
#pragma once

#include <limits>
#include <vector>

#include "matmul_amx.h"
#include "matmul_pack.h"
#include "parallel.h"

namespace pyllmtune {

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

struct TaskSize {
  int64_t rows, columns;
};

// How C is cut into tasks, each packing what it multiplies: the cut with which the busiest thread
// is done first. Sizes are multiples of `step` and at most 2 kBlockRows x kBlockColumns.
inline TaskSize task_size(int64_t rows, int64_t columns, TaskSize step, int64_t threads) {
  constexpr int64_t kPack = 48;  // multiply-adds in the time of packing a number, an estimate
  const auto whole = [](int64_t n, int64_t by) { return parts(n, by) * by; };
  TaskSize best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t down = parts(rows, 2 * kBlockRows);; ++down) {
    const int64_t height = whole(parts(rows, down), step.rows);
    for (int64_t across = parts(columns, kBlockColumns);; ++across) {
      const int64_t width = whole(parts(columns, across), step.columns);
      const int64_t tasks = parts(rows, height) * parts(columns, width);
      const int64_t cost = parts(tasks, threads) * (height * width + kPack * (height + width));
      if (cost < least) least = cost, best = {height, width};
      if (width == step.columns || tasks >= 4 * threads) break;
    }
    if (height == step.rows || down >= 4 * threads) return best;
  }
}

template <class T, class F>
void multiply(Operand<T> a, Operand<T> b, F* c, int64_t stride, int64_t rows, int64_t columns,
              int64_t inner, bool add) {
  using V = typename VectorOf<T>::type;
  if (rows == 0 || columns == 0) return;
  const bool tiles = std::is_same_v<T, Bf16> && multiplies_tiles();
  const TaskSize step = tiles ? TaskSize{kFour, kFour} : TaskSize{kTileRows<V>, kTileColumns<V>};
  const TaskSize task = task_size(rows, columns, step, torch::stable::get_num_threads());
  const int64_t across = parts(columns, task.columns);
  parallel_for(parts(rows, task.rows) * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = n / across * task.rows, j = n % across * task.columns;
      const Operand<T> left{a.at + i * a.row_stride, a.row_stride, a.column_stride};
      const Operand<T> right{b.at + j * b.column_stride, b.row_stride, b.column_stride};
      F* out = c + i * stride + j;
      const int64_t height = std::min(task.rows, rows - i);
      const int64_t width = std::min(task.columns, columns - j);
      if constexpr (std::is_same_v<T, Bf16>) {
        if (tiles) {
          multiply_block_tiles(left, right, out, stride, height, width, inner, add);
          continue;
        }
        if (multiplies_pairs()) {
          multiply_block<Bf16Pair>(left, right, out, stride, height, width, inner, add);
          continue;
        }
      }
      multiply_block<F>(left, right, out, stride, height, width, inner, add);
    }
  });
}

}  // namespace pyllmtune
