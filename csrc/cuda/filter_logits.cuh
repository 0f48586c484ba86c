// filter_logits: logits / T for the tokens that temperature, top-k, top-p and min-p keep, -inf for
// the others; and the gradient, 1 / T where kept.
//
//   logits [outer, inner, V] -> out [outer, inner, V], which may be `logits`
//
//   Forward: one block a row finds the cut (row_filter.cuh), then writes. V read from memory and V
//   written a row are the floor; the reads in between come from L2.
//   Backward: blocks over (row, tile of V), each element on its own: 2 V read, V written.
//   A row with NaN or +inf is NaN throughout; of unsound parameters, or of -inf alone, it is -inf.
//   Limits: V <= 2^27, fewer than 2^31 rows.
#pragma once

#include "row_filter.cuh"

namespace pyllmtune {

constexpr int kGateThreads = 256;
constexpr int kGateChunks = 4;  // 16-byte loads in flight a thread, of each input

__device__ inline float inverse_temperature(float temperature) {  // of a greedy row 0
  return is_greedy(temperature) ? 0.0f : divided_by(1.0f, temperature);
}

template <class T>
__global__ void __launch_bounds__(kFilterThreads, 2)
    filter_logits_kernel(const T* logits, RowLayout layout, T* out, RowLayout out_layout, int vocab,
                         FilterRules rules) {
  constexpr int kSize = Chunk<T>::kSize;
  const int64_t row = blockIdx.x;
  const KeyRow<T> z{logits + layout.offset(row), vocab};
  const FilterRule rule = rules[row];
  int32_t own_top;
  const RowSummary seen = summarize(z, own_top);
  Cut cut{INT32_MAX, -1};  // keeps nothing
  if (!seen.has_bad() && seen.allowed > 0 && rule.sound()) cut = find_cut(z, rule, seen, own_top);

  // in place: the block has read the row; a thread now writes what it alone reads
  T* to = out + out_layout.offset(row);
  const float inverse = inverse_temperature(rule.temperature);
  const float dropped = seen.has_bad() ? NAN : -INFINITY;
  const int step = blockDim.x * kSize;
  for (int first = threadIdx.x * kSize - misalignment(to); first < vocab; first += step) {
    float x[kSize];
    unpack(load_row_chunk(z.logits, first, vocab, -INFINITY), x);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      x[i] = cut.keeps(order_key(x[i]), first + i) ? times_of(x[i], inverse) : dropped;
    store_row_chunk(to, first, vocab, pack<T>(x));
  }
}

template <class T>
__global__ void __launch_bounds__(kGateThreads)
    filter_logits_backward_kernel(const T* __restrict__ grad, RowLayout grad_layout,
                                  const T* __restrict__ output, RowLayout output_layout,
                                  T* __restrict__ grad_logits, int vocab,
                                  PerRow<float> temperature) {
  constexpr int kSize = Chunk<T>::kSize;
  const int64_t row = blockIdx.x;
  const T *upstream = grad + grad_layout.offset(row), *kept = output + output_layout.offset(row);
  T* to = grad_logits + row * vocab;
  const int step = blockDim.x * kSize;
  const int first =
      (blockIdx.y * kGateChunks * blockDim.x + threadIdx.x) * kSize - misalignment(to);
  const float inverse = inverse_temperature(temperature[row]);
  const bool greedy = is_greedy(temperature[row]);
  Chunk<T> gradients[kGateChunks], outputs[kGateChunks];
#pragma unroll
  for (int n = 0; n < kGateChunks; ++n) {
    gradients[n] = load_row_chunk(upstream, first + n * step, vocab, 0.0f);
    outputs[n] = load_row_chunk(kept, first + n * step, vocab, 0.0f);
  }
#pragma unroll
  for (int n = 0; n < kGateChunks; ++n) {
    float g[kSize], x[kSize];
    unpack(gradients[n], g);
    unpack(outputs[n], x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float gated = x[i] == -INFINITY || greedy ? 0.0f : times_of(g[i], inverse);
      x[i] = x[i] != x[i] ? x[i] : gated;  // a row of NaN has a gradient of NaN
    }
    store_row_chunk(to, first + n * step, vocab, pack<T>(x));
  }
}

template <class T>
void launch_filter_logits(const T* logits, RowLayout layout, T* out, RowLayout out_layout,
                          int64_t rows, int vocab, FilterRules rules, cudaStream_t stream) {
  if (rows == 0) return;
  const int chunks = (vocab + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  PLT_LAUNCH(filter_logits_kernel<T>, dim3(static_cast<unsigned>(rows)),
             dim3(threads_for(chunks, kFilterThreads)), 0, stream, logits, layout, out, out_layout,
             vocab, rules);
}

template <class T>
void launch_filter_logits_backward(const T* grad, RowLayout grad_layout, const T* output,
                                   RowLayout output_layout, T* grad_logits, int64_t rows, int vocab,
                                   PerRow<float> temperature, cudaStream_t stream) {
  if (rows == 0) return;
  const int chunks = vocab / Chunk<T>::kSize + 2;  // a row may begin and end inside a chunk
  const int threads = threads_for((chunks + kGateChunks - 1) / kGateChunks, kGateThreads);
  const int tile = threads * kGateChunks;
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>((chunks + tile - 1) / tile));
  PLT_LAUNCH(filter_logits_backward_kernel<T>, grid, dim3(threads), 0, stream, grad, grad_layout,
             output, output_layout, grad_logits, vocab, temperature);
}

}  // namespace pyllmtune
