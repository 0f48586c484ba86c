// kl_divergence: exact divergence of two rows of logits over the vocabulary; and its gradient.
//
//   logits, ref_logits [outer, inner, V] -> divergence [outer, inner], stats [6, outer, inner] =
//   (top, log S, ref_top, log(S'/S), KL(p || .), KL(q || .))          (csrc/math/divergence.h)
//   weight 0: KL(p || q);  W: (1 - W) KL(p || m) + W KL(q || m), m = (1 - W) p + W q
//   dz_j  = p_j (log(p_j/q_j) - KL) / T,  dz'_j = (q_j - p_j) / T
//   of the mixture: dz_j = (1 - W) p_j (log(p_j/m_j) - KL(p || m)) / T,  dz'_j alike with W and q
//
//   Forward reads 2V elements a row and writes 28 bytes; the mixture needs both normalisers first
//   and reads the rows again, from the second-level cache if those in flight fit it. Backward reads
//   2V and writes V for each gradient that is wanted, or only writes where a row has none.
//   Forward: one block a row; a thread keeps PairStats of its chunks and rescales when a maximum
//   grows: two exponentials a pair. Threads are joined in a fixed tree, and the elements of a
//   thread follow from V alone: a row has the same bits in any batch, at any address.
//   Limits: V <= 2^26, fewer than 2^31 rows.
#pragma once

#include "../math/divergence.h"
#include "block.cuh"

namespace pyllmtune {

constexpr int kPairThreads = 256;
constexpr int kPairChunks = 2;  // of either row in flight a thread: four 16-byte loads

template <class T>
struct PairRows {
  const T *logits, *ref_logits;
  RowLayout layout, ref_layout;
  int64_t count;
  int vocab;
  const bool* mask;              // or null
  const float* row_temperature;  // or null
  float temperature, weight;

  __device__ bool selected(int64_t row) const { return mask == nullptr || mask[row]; }
  __device__ float inv_temperature(int64_t row) const {
    return 1.0f / (row_temperature == nullptr ? temperature : row_temperature[row]);
  }
};

struct Sides {
  float p, q;  // KL(p || .), KL(q || .)
};

struct Divergences {
  float *divergence, *stats;
  int64_t rows;

  __device__ void write(int64_t row, const PairRow<float>& pair, float value, Sides sides) const {
    const float values[6] = {pair.top,       pair.log_sum, pair.ref_top,
                             pair.log_ratio, sides.p,      sides.q};
    divergence[row] = value;
#pragma unroll
    for (int k = 0; k < 6; ++k) stats[k * rows + row] = values[k];
  }
};

// f(elements of z, of r) for the chunks of this thread. Columns outside the rows are -inf.
template <class T, class Function>
__device__ inline void for_each_chunk_pair(const T* z, const T* r, int vocab, const Function& f) {
  constexpr int kSize = Chunk<T>::kSize;
  const auto take = [&](const Chunk<T>& a, const Chunk<T>& b) {
    float x[kSize], y[kSize];
    unpack(a, x);
    unpack(b, y);
    f(x, y);
  };
  const int step = blockDim.x * kSize;
  int column = threadIdx.x * kSize;
  if (misalignment(z) == 0 && misalignment(r) == 0)  // without branches; the same order as below
    for (; column + step + kSize <= vocab; column += 2 * step) {
      const Chunk<T> a = load_aligned(z + column), b = load_aligned(r + column);
      const Chunk<T> c = load_aligned(z + column + step), d = load_aligned(r + column + step);
      take(a, b);
      take(c, d);
    }
  for (; column < vocab; column += step)
    take(load_row_chunk(z, column, vocab, -INFINITY), load_row_chunk(r, column, vocab, -INFINITY));
}

template <int N>
__device__ inline void add_pairs(PairStats<float>& part, const float (&z)[N], const float (&r)[N],
                                 float inv_temperature) {
  float top = part.top, ref_top = part.ref_top;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    top = fmaxf(top, z[i]);
    ref_top = fmaxf(ref_top, r[i]);
  }
  if (top > part.top || ref_top > part.ref_top) part.rebase(top, ref_top, inv_temperature);
  // fmaxf dropped a NaN, but NaN - base is NaN and stays in a sum; +inf becomes inf - inf
  const float base = top == -INFINITY ? 0.0f : top;
  const float ref_base = ref_top == -INFINITY ? 0.0f : ref_top;
  const float bits = inv_temperature * float(kBitsPerNat);
  const LogitGap<float> gap(base, ref_base);
#pragma unroll
  for (int i = 0; i < N; ++i)
    part.sums.add(exp2_fast((z[i] - base) * bits), exp2_fast((r[i] - ref_base) * bits),
                  gap(z[i], r[i]) * inv_temperature);
}

// merge() of divergence.h takes exponentials a step; common maxima take them once.
__device__ inline PairStats<float> join_warp(PairStats<float> part, float inv_temperature) {
  part.rebase(warp_max(part.top), warp_max(part.ref_top), inv_temperature);
  part.sums = warp_join(part.sums, [](PairSums<float> a, const PairSums<float>& b) {
    a.sum += b.sum;
    a.ref_sum += b.ref_sum;
    a.moment += b.moment;
    a.residual += b.residual;
    a.lowest = fminf(a.lowest, b.lowest);
    return a;
  });
  return part;
}

template <bool kMixture, class T>
__global__ void __launch_bounds__(kPairThreads)
    kl_divergence_kernel(PairRows<T> rows, Divergences out) {
  const int64_t row = blockIdx.x;
  if (!rows.selected(row)) {
    if (threadIdx.x == 0) out.write(row, {0.0f, 0.0f, 0.0f, 0.0f, 0.0f}, 0.0f, {0.0f, 0.0f});
    return;
  }
  const T* z = rows.logits + rows.layout.offset(row);
  const T* r = rows.ref_logits + rows.ref_layout.offset(row);
  const float inv_temperature = rows.inv_temperature(row);
  const PairStats<float> empty;
  PairStats<float> part;
  for_each_chunk_pair(z, r, rows.vocab, [&](const auto& x, const auto& y) {
    add_pairs(part, x, y, inv_temperature);
  });
  part = block_reduce(
      part, empty, [=](const PairStats<float>& mine) { return join_warp(mine, inv_temperature); });
  if constexpr (!kMixture) {
    if (threadIdx.x != 0) return;
    const PairRow<float> pair = finish(part, false);
    out.write(row, pair, pair.divergence, {pair.divergence, 0.0f});
  } else {
    const PairRow<float> pair = block_broadcast(finish(part, true));
    Sides sides{pair.divergence, pair.divergence};
    if (pair.is_open()) {  // all threads agree
      const RowLogs<float> logs(pair, inv_temperature);
      sides = {0.0f, 0.0f};
      for_each_chunk_pair(z, r, rows.vocab, [&](const auto& x, const auto& y) {
        float p = 0.0f, q = 0.0f;  // short sums lose fewer digits
#pragma unroll
        for (int i = 0; i < Chunk<T>::kSize; ++i) {
          const Mixed<float> token(logs, x[i], y[i], rows.weight, exp2_fast);
          p += token.p_term;
          q += token.q_term;
        }
        sides.p += p;
        sides.q += q;
      });
      const auto add = [](const Sides& a, const Sides& b) { return Sides{a.p + b.p, a.q + b.q}; };
      sides = block_reduce(sides, Sides{0.0f, 0.0f},
                           [=](const Sides& mine) { return warp_join(mine, add); });
    }
    if (threadIdx.x == 0)
      out.write(row, pair, (1.0f - rows.weight) * sides.p + rows.weight * sides.q, sides);
  }
}

template <class T>
struct PairGradient {
  T *logits, *ref_logits;         // either may be null; rows of both begin at one alignment
  RowLayout layout;               // of both
  const float *stats, *upstream;  // [6, rows], [rows]
};

template <bool kMixture, class T>
__global__ void __launch_bounds__(kPairThreads)
    kl_divergence_backward_kernel(PairRows<T> rows, PairGradient<T> grad) {
  constexpr int kSize = Chunk<T>::kSize;
  const int64_t row = blockIdx.x;
  const int64_t at = grad.layout.offset(row);
  T* dz = grad.logits == nullptr ? nullptr : grad.logits + at;
  T* dr = grad.ref_logits == nullptr ? nullptr : grad.ref_logits + at;
  // the first chunk of 16 bytes may begin before the row; its columns are then negative
  const int first = (blockIdx.y * kPairChunks * blockDim.x + threadIdx.x) * kSize -
                    misalignment(dz == nullptr ? dr : dz);
  const int step = blockDim.x * kSize;
  if (first >= rows.vocab) return;

  const auto stat = [&](int k) { return grad.stats[k * rows.count + row]; };
  const PairRow<float> pair{stat(0), stat(1), stat(2), stat(3), stat(4)};
  const float upstream = grad.upstream[row];
  if (!rows.selected(row) || upstream == 0.0f || !pair.is_open()) {
    const Chunk<T> zeros{};  // all bits 0 is 0 in every dtype
#pragma unroll
    for (int n = 0; n < kPairChunks; ++n) {
      if (dz != nullptr) store_row_chunk(dz, first + n * step, rows.vocab, zeros);
      if (dr != nullptr) store_row_chunk(dr, first + n * step, rows.vocab, zeros);
    }
    return;
  }

  const float inv_temperature = rows.inv_temperature(row), scale = upstream * inv_temperature;
  const RowLogs<float> logs(pair, inv_temperature);
  const float p_side = stat(4), q_side = stat(5);
  const float p_scale = (1.0f - rows.weight) * scale, q_scale = rows.weight * scale;
  const T* z = rows.logits + rows.layout.offset(row);
  const T* r = rows.ref_logits + rows.ref_layout.offset(row);
  Chunk<T> in[kPairChunks], ref_in[kPairChunks];
#pragma unroll
  for (int n = 0; n < kPairChunks; ++n) {
    in[n] = load_row_chunk(z, first + n * step, rows.vocab, 0.0f);
    ref_in[n] = load_row_chunk(r, first + n * step, rows.vocab, 0.0f);
  }
#pragma unroll
  for (int n = 0; n < kPairChunks; ++n) {
    float x[kSize], y[kSize];
    unpack(in[n], x);
    unpack(ref_in[n], y);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kMixture) {
        const Mixed<float> token(logs, x[i], y[i], rows.weight, exp2_fast);
        x[i] = token.p * (0.0f - token.log_m_p - p_side) * p_scale;
        y[i] = token.q * (0.0f - token.log_m_q - q_side) * q_scale;
      } else {
        const float p = exp2_fast(logs.log2_p(x[i])), q = exp2_fast(logs.log2_q(y[i]));
        const float d = logs.d(x[i], y[i]);
        x[i] = kl_gradient(p, d, p_side) * scale;
        y[i] = kl_ref_gradient(p, q, d) * scale;
      }
    }
    if (dz != nullptr) store_row_chunk(dz, first + n * step, rows.vocab, pack<T>(x));
    if (dr != nullptr) store_row_chunk(dr, first + n * step, rows.vocab, pack<T>(y));
  }
}

template <class T>
void launch_kl_divergence(PairRows<T> rows, Divergences out, cudaStream_t stream) {
  if (rows.count == 0) return;
  const int chunks = (rows.vocab + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  const dim3 grid(static_cast<unsigned>(rows.count)), block(threads_for(chunks, kPairThreads));
  const auto kernel =
      rows.weight == 0.0f ? kl_divergence_kernel<false, T> : kl_divergence_kernel<true, T>;
  PLT_LAUNCH(kernel, grid, block, 0, stream, rows, out);
}

template <class T>
void launch_kl_divergence_backward(PairRows<T> rows, PairGradient<T> grad, cudaStream_t stream) {
  const T* out = grad.logits == nullptr ? grad.ref_logits : grad.logits;
  if (rows.count == 0 || out == nullptr) return;
  const int partial = rows_are_aligned(out, grad.layout) ? 0 : 1;  // a row may begin in a chunk
  const int chunks = (rows.vocab + Chunk<T>::kSize - 1) / Chunk<T>::kSize + partial;
  const int threads = threads_for((chunks + kPairChunks - 1) / kPairChunks, kPairThreads);
  const int tile = threads * kPairChunks;
  const dim3 grid(static_cast<unsigned>(rows.count),
                  static_cast<unsigned>((chunks + tile - 1) / tile));
  const auto kernel = rows.weight == 0.0f ? kl_divergence_backward_kernel<false, T>
                                          : kl_divergence_backward_kernel<true, T>;
  PLT_LAUNCH(kernel, grid, dim3(threads), 0, stream, rows, grad);
}

}  // namespace pyllmtune
