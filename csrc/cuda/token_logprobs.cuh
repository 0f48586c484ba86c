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

#include "row_stats.cuh"

namespace pyllmtune {

constexpr int kScoreThreads = 256;
constexpr int kGradientChunks = 4;  // 16-byte loads in flight a thread: 16 KiB a block

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
  const RowGradient gradient = row_gradient(max, log_sum, inv_temperature, grad_of);
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
