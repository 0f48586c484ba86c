// temperature_softmax: softmax(z / T), or its logarithm, of every row of logits; and its gradient.
//
//   logits [outer, inner, V] -> output [outer, inner, V], of their dtype or float32
//   p_j = e^(d_j) / S,  log p_j = d_j - log S,  d_j = (z_j - max z) / T,  S = sum_j e^(d_j)
//   softmax: dy_j = p_j (g_j - sum g p);  log: dy_j = g_j - p_j sum g
//   dz_j = dy_j / T,  dT = -(1/T) sum_j dy_j log p_j
//
//   One block a row. Forward reads V elements twice and writes V: once from memory where the rows
//   in flight fit the second-level cache. A greedy row is read once more, for its best id. Backward
//   reads 2V twice, a third time if the temperature wants a gradient, and writes V.
//   Which elements a thread adds up follows from V alone: a row has the same bits in any batch, at
//   any address. Only what is done element by element is cut where its stores are aligned.
//   Limits: V < 2^27, fewer than 2^31 rows.
#pragma once

#include "block.cuh"

namespace pyllmtune {

constexpr int kSoftmaxThreads = 256;
constexpr float kBitsPerNat = 1.44269504f;
// 2^-200 is 0 in float: a finite stand-in for exponents of -inf
constexpr float kLeastExponent = -200.0f;
// half the largest float: of the least temperatures the inverse would be infinite, and 0 * inf NaN
constexpr float kLargestInverse = 1.7e38f;

struct SoftmaxRows {
  int64_t count;
  int vocab;
  const float* row_temperature;  // or null
  float temperature;
  bool log;

  __device__ float temperature_of(int64_t row) const {
    return row_temperature == nullptr ? temperature : row_temperature[row];
  }
  __device__ float nothing() const { return log ? -INFINITY : 0.0f; }  // of a forbidden token
};

// Of a greedy row 1: its maximum and its NaN are what is asked for.
__device__ inline float inverse_of(float temperature) {
  return temperature == 0.0f ? 1.0f : fminf(1.0f / temperature, kLargestInverse);
}

// f(elements of a chunk, first column) for the chunks of this thread, two loads in flight. Columns
// outside the row are `fill`.
template <class T, class Function>
__device__ inline void for_each_chunk(const T* row, int vocab, float fill, const Function& f) {
  constexpr int kSize = Chunk<T>::kSize;
  const int step = blockDim.x * kSize;
  const auto take = [&](const Chunk<T>& chunk, int column) {
    float x[kSize];
    unpack(chunk, x);
    f(x, column);
  };
  int column = threadIdx.x * kSize;
  if (misalignment(row) == 0)  // the common case without its branches; the same order as below
    for (; column + step + kSize <= vocab; column += 2 * step) {
      const Chunk<T> a = load_aligned(row + column), b = load_aligned(row + column + step);
      take(a, column);
      take(b, column + step);
    }
  for (; column < vocab; column += step) take(load_row_chunk(row, column, vocab, fill), column);
}

// The same of two rows at once.
template <class T, class Function>
__device__ inline void for_each_pair(const T* a, const T* b, int vocab, float fill_a, float fill_b,
                                     const Function& f) {
  constexpr int kSize = Chunk<T>::kSize;
  const auto take = [&](const Chunk<T>& chunk_a, const Chunk<T>& chunk_b) {
    float x[kSize], y[kSize];
    unpack(chunk_a, x);
    unpack(chunk_b, y);
#pragma unroll
    for (int i = 0; i < kSize; ++i) f(x[i], y[i]);
  };
  int column = threadIdx.x * kSize;
  const int step = blockDim.x * kSize;
  if (misalignment(a) == 0 && misalignment(b) == 0)
    for (; column + kSize <= vocab; column += step)
      take(load_aligned(a + column), load_aligned(b + column));
  for (; column < vocab; column += step)
    take(load_row_chunk(a, column, vocab, fill_a), load_row_chunk(b, column, vocab, fill_b));
}

// Maximum and sum of e^((z - max) / T) of some elements of a row.
struct PartSum {
  float max, sum;

  // fmaxf turns -inf - -inf, NaN, into the finite stand-in as well
  __device__ void rebase(float top, float bits_per_logit) {
    sum *= exp2_fast(fmaxf((max - top) * bits_per_logit, kLeastExponent));
    max = top;
  }

  template <int N>
  __device__ void add(const float (&z)[N], float bits_per_logit) {
    float top = z[0];
#pragma unroll
    for (int i = 1; i < N; ++i) top = fmaxf(top, z[i]);
    if (top > max) rebase(top, bits_per_logit);
    // fmaxf dropped a NaN, but NaN - base is NaN and stays in sum; +inf becomes inf - inf
    const float base = max == -INFINITY ? 0.0f : max;
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) part += exp2_fast((z[i] - base) * bits_per_logit);
    sum += part;
  }

  __device__ PartSum of_warp(float bits_per_logit) {
    rebase(warp_max(max), bits_per_logit);
    return warp_join(
        *this, [](const PartSum& a, const PartSum& b) { return PartSum{a.max, a.sum + b.sum}; });
  }
};

// In every thread of the block.
__device__ inline float block_sum(float x) {
  const auto add = [](float a, float b) { return a + b; };
  return block_broadcast(block_reduce(x, 0.0f, [=](float mine) { return warp_join(mine, add); }));
}

// What turns a logit of one row into its result. In a row that is `fixed` (greedy, or with nothing
// allowed) only the column decides.
struct RowMap {
  float base, inverse, scale, log_sum, one, rest;
  int best;
  bool fixed, log;

  __device__ float operator()(float z, int column) const {
    if (fixed) return column == best ? one : rest;
    const float d = z - base;
    return log ? d * inverse - log_sum : exp2_fast(d * (inverse * kBitsPerNat)) * scale;
  }
};

// `output` may be `logits`: a thread reads an element before it writes it, and then no other does.
template <class T, class U>
__global__ void __launch_bounds__(kSoftmaxThreads)
    temperature_softmax_kernel(const T* logits, RowLayout layout, U* output, RowLayout out_layout,
                               SoftmaxRows rows) {
  constexpr int kSize = Chunk<T>::kSize, kStored = Chunk<U>::kSize;
  const int64_t row = blockIdx.x;
  const T* z = logits + layout.offset(row);
  U* y = output + out_layout.offset(row);
  const float temperature = rows.temperature_of(row), inverse = inverse_of(temperature);
  const float bits_per_logit = inverse * kBitsPerNat;

  const PartSum empty{-INFINITY, 0.0f};
  PartSum part = empty;
  for_each_chunk(z, rows.vocab, -INFINITY,
                 [&](const float (&x)[kSize], int) { part.add(x, bits_per_logit); });
  part = block_broadcast(
      block_reduce(part, empty, [=](PartSum mine) { return mine.of_warp(bits_per_logit); }));

  const bool nothing_allowed = part.max == -INFINITY && part.sum == 0.0f;
  const bool greedy = temperature == 0.0f && part.sum == part.sum;  // a NaN row stays NaN
  int best = -1;
  if (greedy && !nothing_allowed) {
    best = rows.vocab;
    for_each_chunk(z, rows.vocab, -INFINITY, [&](const float (&x)[kSize], int column) {
#pragma unroll
      for (int i = kSize - 1; i >= 0; --i)
        if (x[i] == part.max && column + i < best) best = column + i;
    });
    const auto least = [](int a, int b) { return a < b ? a : b; };
    best = block_broadcast(
        block_reduce(best, rows.vocab, [=](int mine) { return warp_join(mine, least); }));
  }

  const RowMap map{part.max == -INFINITY ? 0.0f : part.max,
                   inverse,
                   1.0f / part.sum,
                   log_of(part.sum),
                   rows.log ? 0.0f : 1.0f,
                   rows.nothing(),
                   best,
                   greedy || nothing_allowed,
                   rows.log};
  // the first chunk may begin before the row, so that stores are aligned
  for (int column = threadIdx.x * kSize - misalignment(y); column < rows.vocab;
       column += blockDim.x * kSize) {
    float x[kSize];
    unpack(load_row_chunk(z, column, rows.vocab, 0.0f), x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = map(x[i], column + i);
#pragma unroll
    for (int i = 0; i < kSize; i += kStored)
      store_row_chunk(y, column + i, rows.vocab, pack<U>(x + i));
  }
}

// dy of one element. Masks select: the upstream of a forbidden token is never used.
__device__ inline float softmax_gradient(float g, float y, float dot, float nothing, bool log) {
  if (y == nothing) return 0.0f;
  return log ? g - exp2_fast(y * kBitsPerNat) * dot : y * (g - dot);
}

template <class T, class U>
__global__ void __launch_bounds__(kSoftmaxThreads)
    temperature_softmax_backward_kernel(const U* __restrict__ upstream, RowLayout upstream_layout,
                                        const U* __restrict__ output, RowLayout layout,
                                        T* __restrict__ grad, RowLayout grad_layout,
                                        float* __restrict__ grad_temperature, SoftmaxRows rows) {
  constexpr int kSize = Chunk<T>::kSize, kLoaded = Chunk<U>::kSize;
  const int64_t row = blockIdx.x;
  const U *g = upstream + upstream_layout.offset(row), *y = output + layout.offset(row);
  T* dz = grad + grad_layout.offset(row);
  const float temperature = rows.temperature_of(row), inverse = inverse_of(temperature);
  const float nothing = rows.nothing();

  float dot = 0.0f;
  for_each_pair(g, y, rows.vocab, 0.0f, nothing, [&](float up, float out) {
    const float term = rows.log ? up + (out - out) : up * out;  // a NaN in y stays
    dot += out == nothing ? 0.0f : term;
  });
  dot = block_sum(dot);

  // a greedy row has no gradient, unless it is invalid: NaN from end to end
  const bool idle = temperature == 0.0f && to_float(y[0]) == to_float(y[0]);
  if (grad_temperature != nullptr) {
    float sum = 0.0f;
    for_each_pair(g, y, rows.vocab, 0.0f, nothing, [&](float up, float out) {
      const float dy = softmax_gradient(up, out, dot, nothing, rows.log);
      // a probability that is 0 to the logarithm has no part in it
      const float log_p = rows.log ? out : fmaxf(log_of(out), kLeastExponent);
      sum += dy == 0.0f ? 0.0f : dy * log_p;
    });
    __syncthreads();  // the second reduction reuses the shared memory of the first
    sum = block_sum(sum);
    if (threadIdx.x == 0) grad_temperature[row] = idle ? 0.0f : -inverse * sum;
  }

  for (int column = threadIdx.x * kSize - misalignment(dz); column < rows.vocab;
       column += blockDim.x * kSize) {
    float x[kSize];
#pragma unroll
    for (int i = 0; i < kSize; i += kLoaded) {
      float up[kLoaded], out[kLoaded];
      unpack(load_row_chunk(g, column + i, rows.vocab, 0.0f), up);
      unpack(load_row_chunk(y, column + i, rows.vocab, 0.0f), out);
#pragma unroll
      for (int k = 0; k < kLoaded; ++k) {
        const float dy = softmax_gradient(up[k], out[k], dot, nothing, rows.log);
        x[i + k] = idle ? 0.0f : dy * inverse;
      }
    }
    store_row_chunk(dz, column, rows.vocab, pack<T>(x));
  }
}

inline int softmax_threads(int vocab, int chunk) {
  return threads_for((vocab + 2 * chunk - 1) / (2 * chunk), kSoftmaxThreads);
}

template <class T, class U>
void launch_temperature_softmax(const T* logits, RowLayout layout, U* output, RowLayout out_layout,
                                SoftmaxRows rows, cudaStream_t stream) {
  if (rows.count == 0) return;
  const dim3 grid(static_cast<unsigned>(rows.count));
  const dim3 block(softmax_threads(rows.vocab, Chunk<T>::kSize));
  const auto kernel = temperature_softmax_kernel<T, U>;
  PLT_LAUNCH(kernel, grid, block, 0, stream, logits, layout, output, out_layout, rows);
}

template <class T, class U>
void launch_temperature_softmax_backward(const U* upstream, RowLayout upstream_layout,
                                         const U* output, RowLayout layout, T* grad,
                                         RowLayout grad_layout, float* grad_temperature,
                                         SoftmaxRows rows, cudaStream_t stream) {
  if (rows.count == 0) return;
  const dim3 grid(static_cast<unsigned>(rows.count));
  const dim3 block(softmax_threads(rows.vocab, Chunk<T>::kSize));
  const auto kernel = temperature_softmax_backward_kernel<T, U>;
  PLT_LAUNCH(kernel, grid, block, 0, stream, upstream, upstream_layout, output, layout, grad,
             grad_layout, grad_temperature, rows);
}

}  // namespace pyllmtune
