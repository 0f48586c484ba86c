// linear_token_logprobs: what is done with one tile of logits, hidden W^T, between two matmuls of
// the library.
//
//   logits [rows, columns] float32, columns first ... of the vocabulary
//   z = softcap(scale (logits + bias)),  softcap(u) = cap tanh(u / cap)
//   running [4, rows] = (max, sum, weighted, target logit), in: of the columns before; out: with
//   these. scores [3, rows] = (log-prob, entropy, logsumexp) of the columns so far.
//   grad [rows, columns] = d/dlogits, in the dtype of the operands, rows on 16-byte boundaries.
//
//   Forward reads the tile once and writes 28 bytes a row; backward reads 4 bytes a logit and
//   writes sizeof(T). Forward: one block a row, as token_logprobs.cuh. Backward: blocks over (row,
//   part of the columns), each element on its own.
//   Limits: fewer than 2^31 rows and columns.
#pragma once

#include "row_stats.cuh"

namespace pyllmtune {

constexpr int kTileThreads = 256;

struct LinearTile {
  const float* logits;
  int64_t rows, stride;
  int columns;
  int64_t first;
  float scale, cap;   // cap 0: none
  const float* bias;  // of the first column, or null
  const int64_t* tokens;
  float temperature;
  const float* row_temperature;  // or null

  __device__ float inv_temperature(int64_t row) const {
    return 1.0f / (row_temperature == nullptr ? temperature : row_temperature[row]);
  }

  __device__ float processed(float x, float bias_here) const {
    const float u = scale * (x + bias_here);
    return cap == 0.0f ? u : cap * tanhf(u / cap);
  }

  // z of N columns; -inf beyond the last one, whatever was there.
  template <int N>
  __device__ void load(const float* row, int column, float (&z)[N]) const {
    constexpr int kSize = Chunk<float>::kSize;
    static_assert(N % kSize == 0, "whole chunks");
    Chunk<float> chunk[N / kSize];
#pragma unroll
    for (int n = 0; n < N / kSize; ++n)
      chunk[n] = load_row_chunk(row, column + n * kSize, columns, 0.0f);
#pragma unroll
    for (int n = 0; n < N / kSize; ++n) {
      unpack(chunk[n], z + n * kSize);
#pragma unroll
      for (int i = n * kSize; i < (n + 1) * kSize; ++i) {
        const bool inside = column + i < columns;
        const float b = bias != nullptr && inside ? bias[column + i] : 0.0f;
        z[i] = inside ? processed(z[i], b) : -INFINITY;
      }
    }
  }
};

__global__ void __launch_bounds__(kTileThreads)
    linear_token_logprobs_tile_kernel(LinearTile tile, float* running, float* scores) {
  const int64_t row = blockIdx.x, rows = tile.rows;
  const float* logits = tile.logits + row * tile.stride;
  const float inv_temperature = tile.inv_temperature(row);
  const float bits_per_logit = inv_temperature * kLog2E;
  const PartStats empty{-INFINITY, 0.0f, 0.0f};
  PartStats part = empty;
  constexpr int kGroup = 2 * Chunk<float>::kSize;
  for (int column = threadIdx.x * kGroup; column < tile.columns; column += blockDim.x * kGroup) {
    float z[kGroup];
    tile.load(logits, column, z);
    part.add(z, bits_per_logit);
  }
  part = block_reduce(part, empty, [=](PartStats mine) { return mine.of_warp(bits_per_logit); });
  if (threadIdx.x != 0) return;

  const SoftmaxStats<float> before{running[row], running[rows + row], running[2 * rows + row]};
  auto stats = merge(before, {part.max, part.sum, part.weighted * kLn2}, inv_temperature);
  float target = running[3 * rows + row];
  const int64_t token = tile.tokens[row] - tile.first;
  if (token >= 0 && token < tile.columns)
    target = tile.processed(logits[token], tile.bias == nullptr ? 0.0f : tile.bias[token]);
  running[row] = stats.max;
  running[rows + row] = stats.sum;
  running[2 * rows + row] = stats.weighted;
  running[3 * rows + row] = target;
  if (target != target) stats.sum = target;  // not seen yet; in the end: there is no such token
  const TokenScore<float> score = finish(stats, target, inv_temperature);
  scores[row] = score.logprob;
  scores[rows + row] = score.entropy;
  scores[2 * rows + row] = score.logsumexp;
}

// stats [3, rows] = (max, sum, entropy); upstream [3, rows].
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    linear_token_logprobs_tile_backward_kernel(LinearTile tile, const float* stats,
                                               const float* upstream, T* grad,
                                               int64_t grad_stride) {
  constexpr int kSize = Chunk<T>::kSize;
  const int64_t row = blockIdx.x, rows = tile.rows;
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * kSize;
  if (column >= tile.columns) return;
  T* out = grad + row * grad_stride;
  const float max = stats[row], sum = stats[rows + row];
  if (max == -INFINITY && sum == 0.0f) {  // nothing is allowed
    store_row_chunk(out, column, tile.columns, Chunk<T>{});
    return;
  }
  float z[kSize];
  tile.load(tile.logits + row * tile.stride, column, z);
  const float inv_temperature = tile.inv_temperature(row);
  const auto by_z = score_gradient(upstream[row], upstream[rows + row], upstream[2 * rows + row],
                                   stats[2 * rows + row], inv_temperature);
  const RowGradient gradient = row_gradient(max, logf(sum), inv_temperature, by_z);
  const int64_t target = tile.tokens[row] - tile.first - column;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float t = tile.cap == 0.0f ? 0.0f : z[i] / tile.cap;
    z[i] = (gradient(z[i]) + (target == i ? by_z.at_target : 0.0f)) * tile.scale * (1.0f - t * t);
  }
  store_row_chunk(out, column, tile.columns, pack<T>(z));
}

inline void launch_linear_token_logprobs_tile(LinearTile tile, float* running, float* scores,
                                              cudaStream_t stream) {
  if (tile.rows == 0) return;
  const dim3 grid(static_cast<unsigned>(tile.rows));
  const dim3 block(threads_for((tile.columns + 7) / 8, kTileThreads));
  PLT_LAUNCH(linear_token_logprobs_tile_kernel, grid, block, 0, stream, tile, running, scores);
}

template <class T>
void launch_linear_token_logprobs_tile_backward(LinearTile tile, const float* stats,
                                                const float* upstream, T* grad, int64_t grad_stride,
                                                cudaStream_t stream) {
  if (tile.rows == 0) return;
  const int chunks = (tile.columns + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  const int threads = threads_for(chunks, kTileThreads);
  const dim3 grid(static_cast<unsigned>(tile.rows),
                  static_cast<unsigned>((chunks + threads - 1) / threads));
  PLT_LAUNCH(linear_token_logprobs_tile_backward_kernel<T>, grid, dim3(threads), 0, stream, tile,
             stats, upstream, grad, grad_stride);
}

}  // namespace pyllmtune
