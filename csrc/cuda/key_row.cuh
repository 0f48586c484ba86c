// key_row: the allowed logits of one row as integers of the same order (csrc/math/masses.h), read
// by a block: each warp has a stretch of ids of its own, so that a sum in order of id is a sum over
// warps, then over the chunks of one stretch.
#pragma once

#include "../math/masses.h"
#include "block.cuh"

namespace pyllmtune {

constexpr int32_t kInfKey = 0x7f800000, kNoneKey = ~kInfKey;  // order_key of +inf and -inf

// The allowed logits of one row, as keys; what is not allowed is kNoneKey and may hold anything.
template <class T>
struct KeyRow {
  static constexpr int kSize = Chunk<T>::kSize;
  static constexpr int kStep = kWarp * kSize;  // ids that a warp reads at once
  const T* logits;
  int vocab;
  const bool* allowed = nullptr;           // [V], or null
  const uint32_t* allowed_bits = nullptr;  // [ceil(V / 32)], or null

  // Ids of a warp: stretch(w) up to stretch(w + 1).
  __device__ int stretch(int warp) const {
    const int chunks = (vocab + kSize - 1) / kSize, warps = blockDim.x / kWarp;
    return min(vocab, warp * ((chunks + warps - 1) / warps) * kSize);
  }

  __device__ int32_t key_at(int id) const { return order_key(to_float(logits[id])); }

  __device__ void keys_of(const Chunk<T>& chunk, int first, int32_t (&key)[kSize]) const {
    float z[kSize];
    unpack(chunk, z);
#pragma unroll
    for (int i = 0; i < kSize; ++i) key[i] = order_key(z[i]);
    if (allowed != nullptr) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (first + i < vocab && !allowed[first + i]) key[i] = kNoneKey;
    }
    if (allowed_bits != nullptr && first < vocab) {  // kSize divides 32: one word has them all
      const uint32_t word = allowed_bits[first / 32] >> first % 32;
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if ((word >> i & 1) == 0) key[i] = kNoneKey;
    }
  }

  // f(keys, first id) for the chunks of this thread in the stretch of `warp`, until f is true.
  // All lanes go round together: f may hold warp operations if it answers all of them the same.
  template <class F>
  __device__ void chunks_until(int warp, const F& f) const {
    const int end = stretch(warp + 1);
    for (int base = stretch(warp); base < end; base += 2 * kStep) {
      int first = base + threadIdx.x % kWarp * kSize;
      Chunk<T> chunk = load_row_chunk(logits, first, end, -INFINITY);
      const Chunk<T> next = load_row_chunk(logits, first + kStep, end, -INFINITY);
#pragma unroll 1  // two loads in flight, one copy of f: half the code and fewer registers
      for (int part = 0; part < 2; ++part, chunk = next, first += kStep) {
        int32_t key[kSize];
        keys_of(chunk, first, key);
        if (f(key, first)) return;
      }
    }
  }

  // f(key, id) for all ids of this thread; ids outside the row have kNoneKey.
  template <class F>
  __device__ void each(const F& f) const {
    chunks_until(threadIdx.x / kWarp, [&](const int32_t (&key)[kSize], int first) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) f(key[i], first + i);
      return false;
    });
  }
};

struct AllowedTokens {
  const bool* flags;     // [rows or 1, V], or null
  const uint32_t* bits;  // [rows or 1, ceil(V / 32)], or null
  bool per_row;

  template <class T>
  __device__ KeyRow<T> of(const T* logits, int64_t row, int vocab) const {
    const int64_t set = per_row ? row : 0, words = (vocab + 31) / 32;
    return {logits, vocab, flags == nullptr ? nullptr : flags + set * vocab,
            bits == nullptr ? nullptr : bits + set * words};
  }
};

template <class Part>
__device__ inline Part block_sum(const Part& part) {  // in every thread
  return block_broadcast(block_reduce(part, Part{}, [](const Part& mine) {
    return warp_join(mine, [](const Part& a, const Part& b) { return a + b; });
  }));
}

// Sum of the lanes before this one, and of all.
struct WarpScan {
  int64_t before, all;

  __device__ explicit WarpScan(int64_t mine) {
    const int lane = threadIdx.x % kWarp;
    int64_t sum = mine;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    before = sum - mine;
    all = __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
};

// of_warps[w]: the sum of weight(key, id) over the stretch of warp w.
template <class T, class Weight>
__device__ void sum_stretches(const KeyRow<T>& row, const Weight& weight, int64_t* of_warps) {
  int64_t sum = 0;
  row.each([&](int32_t key, int id) { sum += weight(key, id); });
  sum = warp_join(sum, [](int64_t a, int64_t b) { return a + b; });
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
}

// The first id at which the sum of weights, in order of id, exceeds `target`, which is below the
// sum of all; by a whole warp, in every lane.
template <class T, class Weight>
__device__ int walk(const KeyRow<T>& row, const Weight& weight, const int64_t* of_warps,
                    int64_t target) {
  int warp = 0, found = row.vocab - 1;
  while (target >= of_warps[warp]) target -= of_warps[warp++];
  row.chunks_until(warp, [&](const int32_t (&key)[Chunk<T>::kSize], int first) {
    int64_t mine = 0;
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; ++i) mine += weight(key[i], first + i);
    const WarpScan scan(mine);
    if (target >= scan.all) {
      target -= scan.all;
      return false;
    }
    int64_t sum = scan.before;
    int id = first;
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; ++i) {
      sum += weight(key[i], first + i);
      id += sum <= target;
    }
    const unsigned owner =
        __ballot_sync(kAllLanes, target >= scan.before && target < scan.before + mine);
    found = __shfl_sync(kAllLanes, id, __ffs(static_cast<int>(owner)) - 1);
    return true;
  });
  return found;
}

struct RowSummary {
  int32_t top, lowest;
  int allowed;

  __device__ bool has_bad() const { return lowest < kNoneKey || top >= kInfKey; }  // NaN, +inf
};

template <class T>
__device__ RowSummary summarize(const KeyRow<T>& row, int32_t& own_top) {
  const RowSummary empty{kNoneKey, kNoneKey, 0};
  RowSummary mine = empty;
  row.each([&](int32_t key, int) {
    mine = {max(mine.top, key), min(mine.lowest, key), mine.allowed + (key > kNoneKey)};
  });
  own_top = mine.top;
  return block_broadcast(block_reduce(mine, empty, [](const RowSummary& part) {
    return warp_join(part, [](const RowSummary& a, const RowSummary& b) {
      return RowSummary{max(a.top, b.top), min(a.lowest, b.lowest), a.allowed + b.allowed};
    });
  }));
}

}  // namespace pyllmtune
