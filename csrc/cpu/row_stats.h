// row_stats: maximum, sum and, for an entropy, weighted sum of a stripe of logits, in one read.
//
// A tile that fits the first-level cache is read twice, for its maximum and for its sums; memory is
// read once. Tiles are merged in order (csrc/math/online_softmax.h).
#pragma once

#include <algorithm>

#include "../math/online_softmax.h"
#include "memory.h"
#include "simd.h"

namespace pyllmtune {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr int64_t kTile = 4096;  // 16 KiB of float32: half of the smallest first-level cache in use

template <class V, class T>
typename V::Scalar tile_max(const T* z, int64_t n) {
  using F = typename V::Scalar;
  const V none(-std::numeric_limits<F>::infinity());
  V m[4] = {none, none, none, none};
  int64_t i = 0;
  for (; i + 4 * V::kWidth <= n; i += 4 * V::kWidth)
    for (int k = 0; k < 4; ++k) m[k] = max_of(load(z + i + k * V::kWidth), m[k]);
  for (; i + V::kWidth <= n; i += V::kWidth) m[0] = max_of(load(z + i), m[0]);
  if (i < n) m[0] = max_of(load_first(z + i, n - i, -std::numeric_limits<F>::infinity()), m[0]);
  return reduce_max(max_of(max_of(m[0], m[1]), max_of(m[2], m[3])));
}

template <class V, bool kEntropy, class T>
SoftmaxStats<typename V::Scalar> tile_sums(const T* z, int64_t n, typename V::Scalar top,
                                           typename V::Scalar inv_temperature) {
  using F = typename V::Scalar;
  const F none = -std::numeric_limits<F>::infinity();
  const V base(top == none ? F(0) : top), scale(inv_temperature * F(kLog2E));
  V sum[4], weighted[4];
  for (int k = 0; k < 4; ++k) sum[k] = weighted[k] = V(F(0));
  auto add = [&](int k, V logits) {
    V y = (logits - base) * scale;
    const V e = exp2_nonpositive(y);
    sum[k] = sum[k] + e;
    if constexpr (kEntropy) weighted[k] = fma_of(e, y, weighted[k]);
  };
  int64_t i = 0;
  for (; i + 4 * V::kWidth <= n; i += 4 * V::kWidth)
    for (int k = 0; k < 4; ++k) {
      prefetch(z + i + k * V::kWidth + kTile);  // the next tile comes while this one is computed
      add(k, load(z + i + k * V::kWidth));
    }
  for (; i + V::kWidth <= n; i += V::kWidth) add(0, load(z + i));
  if (i < n) add(1, load_first(z + i, n - i, none));
  return {top, reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3])),
          reduce_sum((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])) * F(kLn2)};
}

template <class V, bool kEntropy, class T>
SoftmaxStats<typename V::Scalar> tile_stats(const T* z, int64_t n,
                                            typename V::Scalar inv_temperature) {
  return tile_sums<V, kEntropy>(z, n, tile_max<V>(z, n), inv_temperature);
}

template <class V, bool kEntropy, class T>
SoftmaxStats<typename V::Scalar> stripe_stats(const T* z, int64_t n,
                                              typename V::Scalar inv_temperature) {
  SoftmaxStats<typename V::Scalar> stats;
  for (int64_t i = 0; i < n; i += kTile)
    stats = merge(stats, tile_stats<V, kEntropy>(z + i, std::min(kTile, n - i), inv_temperature),
                  inv_temperature);
  return stats;
}

}  // namespace pyllmtune
