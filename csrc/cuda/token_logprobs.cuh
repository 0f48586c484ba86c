// token_logprobs: log-prob of one token a row, entropy and logsumexp, from one read of the logits;
// and their gradient.
//
//   logits [outer, inner, V] -> logprobs, entropy, logsumexp [outer, inner],
//                               stats [2, outer, inner] = (max, log S)
//   dz_j = p_j (constant + slope log p_j) + 1[j = y] at_target     (csrc/math/online_softmax.h)
//
//   Forward reads V elements a row and writes 20 bytes; backward reads V and writes V, or only
//   writes where a row has no upstream gradient. Those bytes are the floor.
//
//   Forward: one block a row. A thread keeps (max, sum, weighted) of its chunks and rescales only
//   when its maximum grows: one exponential an element. Threads are joined in a fixed tree, and the
//   elements of a thread follow from V alone: a row has the same bits in any batch, at any address.
//   Backward: blocks over (row, tile of V), each element on its own.
//   Limits: V < 2^27, fewer than 2^31 rows.
#pragma once

#include "../math/online_softmax.h"
#include "block.cuh"

namespace pyllmtune {

constexpr int kScoreThreads = 256;
constexpr int kGradientChunks = 4;  // 16-byte loads in flight a thread: 16 KiB a block
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
// 2^-200 is 0 in float: a finite stand-in for exponents of -inf, since 0 * -inf would be NaN
constexpr float kLowestExponent = -200.0f;

struct ScoreRows {
  int64_t count;
  int vocab;
  const int64_t* tokens;
  const bool* mask;              // or null
  const float* row_temperature;  // or null
  float temperature;

  __device__ bool selected(int64_t row) const { return mask == nullptr || mask[row]; }
  __device__ float inv_temperature(int64_t row) const {
    return 1.0f / (row_temperature == nullptr ? temperature : row_temperature[row]);
  }
};

struct Scores {
  float *logprobs, *entropy, *logsumexp, *max, *log_sum;

  __device__ void write(int64_t row, const TokenScore<float>& score, float row_max) const {
    logprobs[row] = score.logprob;
    entropy[row] = score.entropy;
    logsumexp[row] = score.logsumexp;
    max[row] = row_max;
    log_sum[row] = score.log_sum;
  }
};

struct ScoreUpstream {
  const float *entropy, *max, *log_sum, *grad_logprobs, *grad_entropy, *grad_logsumexp;
};

// Statistics of some elements of a row, as SoftmaxStats, but `weighted` has its exponents in bits.
struct PartStats {
  float max, sum, weighted;

  // Makes `top` the reference, which is max or more. fmaxf turns -inf - -inf, NaN, into the finite
  // stand-in as well.
  __device__ void rebase(float top, float bits_per_logit) {
    const float shift = fmaxf((max - top) * bits_per_logit, kLowestExponent);
    const float scale = exp2_fast(shift);
    weighted = scale * (weighted + shift * sum);
    sum *= scale;
    max = top;
  }

  template <int N>
  __device__ void add(const float (&z)[N], float bits_per_logit) {
    float top = z[0];
#pragma unroll
    for (int i = 1; i < N; ++i) top = fmaxf(top, z[i]);
    if (top > max) rebase(top, bits_per_logit);
    // fmaxf dropped a NaN, but NaN - base is NaN and stays in sum; +inf becomes inf - inf. As long
    // as nothing is allowed, any finite base keeps -inf at 0.
    const float base = max == -INFINITY ? 0.0f : max;
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float exponent = (z[i] - base) * bits_per_logit;
      const float e = exp2_fast(exponent);
      part += e;
      weighted += e * fmaxf(exponent, kLowestExponent);
    }
    sum += part;
  }

  // merge() of online_softmax.h takes two exponentials a step; one common maximum takes one in all.
  __device__ PartStats of_warp(float bits_per_logit) {
    rebase(warp_max(max), bits_per_logit);
    return warp_join(*this, [](const PartStats& a, const PartStats& b) {
      return PartStats{a.max, a.sum + b.sum, a.weighted + b.weighted};
    });
  }
};

template <class T>
__global__ void __launch_bounds__(kScoreThreads)
    token_logprobs_kernel(const T* __restrict__ logits, RowLayout layout, ScoreRows rows,
                          Scores out) {
  const int64_t row = blockIdx.x;
  if (!rows.selected(row)) {
    if (threadIdx.x == 0) out.write(row, {0.0f, 0.0f, 0.0f, 0.0f}, 0.0f);
    return;
  }
  constexpr int kSize = Chunk<T>::kSize;
  const T* z = logits + layout.offset(row);
  const float inv_temperature = rows.inv_temperature(row);
  const float bits_per_logit = inv_temperature * kLog2E;
  bool exists = false;
  float target = 0.0f;
  if (threadIdx.x == 0) {  // early, so that the latency of two loads hides behind the row
    const int64_t token = rows.tokens[row];
    exists = token >= 0 && token < rows.vocab;
    if (exists) target = to_float(z[token]);
  }

  const PartStats empty{-INFINITY, 0.0f, 0.0f};
  PartStats part = empty;
  const auto take = [&](const Chunk<T>& a, const Chunk<T>& b) {
    float x[2 * kSize];
    unpack(a, x);
    unpack(b, x + kSize);
    part.add(x, bits_per_logit);
  };
  const int step = blockDim.x * kSize;
  int column = threadIdx.x * kSize;
  if (misalignment(z) == 0)  // the common case without its branches; the same pairs as below
    for (; column + step + kSize <= rows.vocab; column += 2 * step)
      take(load_aligned(z + column), load_aligned(z + column + step));
  for (; column < rows.vocab; column += 2 * step)
    take(load_row_chunk(z, column, rows.vocab, -INFINITY),
         load_row_chunk(z, column + step, rows.vocab, -INFINITY));

  part = block_reduce(part, empty, [=](PartStats mine) { return mine.of_warp(bits_per_logit); });
  if (threadIdx.x != 0) return;
  SoftmaxStats<float> whole{part.max, part.sum, part.weighted * kLn2};
  if (!exists) whole.sum = NAN;  // a token that does not exist: poison its row, no other
  out.write(row, finish(whole, target, inv_temperature), whole.max);
}

// What turns a logit of one row into its gradient.
struct RowGradient {
  float max, bits_per_logit, log2_sum, constant, slope_per_bit;

  __device__ float operator()(float z) const {
    const float log2_p = (z - max) * bits_per_logit - log2_sum;
    return exp2_fast(log2_p) * (constant + slope_per_bit * fmaxf(log2_p, kLowestExponent));
  }
};

// `grad` may be `logits`: every thread reads all it needs before it writes, and no other thread
// reads that.
template <class T>
__global__ void __launch_bounds__(kScoreThreads)
    token_logprobs_backward_kernel(const T* logits, RowLayout layout, T* grad,
                                   RowLayout grad_layout, ScoreRows rows, ScoreUpstream up) {
  constexpr int kSize = Chunk<T>::kSize;
  const int64_t row = blockIdx.x;
  const T* z = logits + layout.offset(row);
  T* dz = grad + grad_layout.offset(row);
  // the first chunk of 16 bytes may begin before the row; its columns are then negative
  const int first =
      (blockIdx.y * kGradientChunks * blockDim.x + threadIdx.x) * kSize - misalignment(dz);
  const int step = blockDim.x * kSize;
  if (first >= rows.vocab) return;

  const float max = up.max[row], log_sum = up.log_sum[row];
  const bool nothing_allowed = max == -INFINITY && log_sum == 0.0f;
  const float g = up.grad_logprobs[row], h = up.grad_entropy[row], q = up.grad_logsumexp[row];
  if (!rows.selected(row) || (g == 0.0f && h == 0.0f && q == 0.0f) || nothing_allowed) {
    const Chunk<T> zeros{};  // all bits 0 is 0 in every dtype
#pragma unroll
    for (int n = 0; n < kGradientChunks; ++n)
      store_row_chunk(dz, first + n * step, rows.vocab, zeros);
    return;
  }

  const float inv_temperature = rows.inv_temperature(row);
  const auto grad_of = score_gradient(g, h, q, up.entropy[row], inv_temperature);
  const RowGradient gradient{max, inv_temperature * kLog2E, log_sum * kLog2E, grad_of.constant,
                             grad_of.slope * kLn2};
  const int64_t token = rows.tokens[row];
  Chunk<T> in[kGradientChunks];
#pragma unroll
  for (int n = 0; n < kGradientChunks; ++n)
    in[n] = load_row_chunk(z, first + n * step, rows.vocab, 0.0f);
#pragma unroll
  for (int n = 0; n < kGradientChunks; ++n) {
    const int column = first + n * step;
    float x[kSize];
    unpack(in[n], x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = gradient(x[i]);
    if (token >= column && token < column + kSize) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] += token == column + i ? grad_of.at_target : 0.0f;
    }
    store_row_chunk(dz, column, rows.vocab, pack<T>(x));
  }
}

template <class T>
void launch_token_logprobs(const T* logits, RowLayout layout, ScoreRows rows, Scores out,
                           cudaStream_t stream) {
  if (rows.count == 0) return;
  const int chunks = (rows.vocab + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  const dim3 grid(static_cast<unsigned>(rows.count));
  const dim3 block(threads_for((chunks + 1) / 2, kScoreThreads));
  PLT_LAUNCH(token_logprobs_kernel<T>, grid, block, 0, stream, logits, layout, rows, out);
}

template <class T>
void launch_token_logprobs_backward(const T* logits, RowLayout layout, T* grad,
                                    RowLayout grad_layout, ScoreRows rows, ScoreUpstream up,
                                    cudaStream_t stream) {
  if (rows.count == 0) return;
  const int partial =
      rows_are_aligned(grad, grad_layout) ? 0 : 1;  // a row may begin inside a chunk
  const int chunks = (rows.vocab + Chunk<T>::kSize - 1) / Chunk<T>::kSize + partial;
  const int threads = threads_for((chunks + kGradientChunks - 1) / kGradientChunks, kScoreThreads);
  const int tile = threads * kGradientChunks;
  const dim3 grid(static_cast<unsigned>(rows.count),
                  static_cast<unsigned>((chunks + tile - 1) / tile));
  PLT_LAUNCH(token_logprobs_backward_kernel<T>, grid, dim3(threads), 0, stream, logits, layout,
             grad, grad_layout, rows, up);
}

}  // namespace pyllmtune
