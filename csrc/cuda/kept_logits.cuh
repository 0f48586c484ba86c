// kept_logits: logits of kept tokens alone, straight from hidden states: a dot product for each.
//
//   hidden [rows, D], weight [V, D], offsets [rows + 1], token_ids [entries] -> logits [entries]
//   logits_e = <hidden_row(e), weight_id(e)>
//   dhidden_i = sum over row i of g_e weight_id(e);  dweight_v = sum over id v of g_e hidden_row(e)
//
//   Moves a row of D of the weight for each entry, and in backward again; dweight holds zeros, and
//   of it the rows of kept ids are written. Products of bfloat16 and float16 are formed in float32,
//   sums are float32, rounded once, in the order of entries: the same bits in any batch. Entries
//   whose gradient is 0 are not read: a row that was masked may hold NaN.
//   Forward: a block a row, a warp an entry. Backward: blocks over (row or id, columns), a thread
//   has its columns and goes through the entries.
//   Limits: D < 2^27; an id that occurs in every row is work for one thread a column in dweight.
#pragma once

#include "kept_sets.cuh"

namespace pyllmtune {

constexpr int kKeptLogitsThreads = 128;  // four entries at a time, or 2 KiB of a row of D

struct Head {  // contiguous
  int vocab, size;
};

template <class T>
__global__ void __launch_bounds__(kKeptLogitsThreads)
    kept_logits_kernel(const T* __restrict__ hidden, const T* __restrict__ weight, Head head,
                       KeptSets kept, const bool* mask, float* logits) {
  constexpr int kSize = Chunk<T>::kSize;
  const int64_t row = blockIdx.x;
  if (!kept.in_bounds(row)) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool selected = mask == nullptr || mask[row];
  const int64_t end = kept.offsets[row + 1];
  for (int64_t entry = kept.offsets[row] + warp; entry < end; entry += kKeptLogitsThreads / kWarp) {
    const int id = kept.ids[entry];
    float sum = id >= 0 && id < head.vocab ? 0.0f : NAN;
    if (selected && sum == 0.0f)
      for (int column = lane * kSize; column < head.size; column += kWarp * kSize) {
        const Chunk<T> h = load_row_chunk(hidden + row * head.size, column, head.size, 0.0f);
        const Chunk<T> w =
            load_row_chunk(weight + int64_t(id) * head.size, column, head.size, 0.0f);
        float a[kSize], b[kSize];
        unpack(h, a);
        unpack(w, b);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum += a[i] * b[i];
      }
    sum = warp_join(sum, [](float a, float b) { return a + b; });
    if (lane == 0) logits[entry] = selected ? sum : 0.0f;
  }
}

// The columns of one thread, which begin on a 16-byte boundary of `out`.
template <class T>
struct ColumnSum {
  static constexpr int kSize = Chunk<T>::kSize;
  int column, size;
  float sum[kSize] = {};

  __device__ ColumnSum(const T* out, int size)
      : column((blockIdx.y * blockDim.x + threadIdx.x) * kSize - misalignment(out)), size(size) {}
  __device__ void add(float factor, const T* row) {
    float x[kSize];
    unpack(load_row_chunk(row, column, size, 0.0f), x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] += factor * x[i];
  }
  __device__ void store(T* out) const { store_row_chunk(out, column, size, pack<T>(sum)); }
};

template <class T>
__global__ void __launch_bounds__(kKeptLogitsThreads)
    kept_logits_backward_hidden_kernel(const float* __restrict__ grad, const T* __restrict__ weight,
                                       Head head, KeptSets kept, T* out) {
  const int64_t row = blockIdx.x;
  T* own = out + row * head.size;
  ColumnSum<T> columns(own, head.size);
  const int64_t end = kept.in_bounds(row) ? kept.offsets[row + 1] : kept.offsets[row];
  for (int64_t entry = kept.offsets[row]; entry < end; ++entry) {
    const float g = grad[entry];
    const int id = kept.ids[entry];
    if (g != 0.0f && id >= 0 && id < head.vocab) columns.add(g, weight + int64_t(id) * head.size);
  }
  columns.store(own);
}

// Entries by token: grad, rows and ids [entries], ids ascending. `out` holds zeros.
template <class T>
__global__ void __launch_bounds__(kKeptLogitsThreads)
    kept_logits_backward_weight_kernel(const float* __restrict__ grad,
                                       const int64_t* __restrict__ rows,
                                       const int32_t* __restrict__ ids, int64_t entries,
                                       const T* __restrict__ hidden, Head head, T* out) {
  const int64_t first = blockIdx.x;
  const int id = ids[first];
  if (id < 0 || id >= head.vocab || (first > 0 && ids[first - 1] == id)) return;
  T* own = out + int64_t(id) * head.size;
  ColumnSum<T> columns(own, head.size);
  for (int64_t entry = first; entry < entries && ids[entry] == id; ++entry)
    if (grad[entry] != 0.0f) columns.add(grad[entry], hidden + rows[entry] * head.size);
  columns.store(own);
}

template <class T>
void launch_kept_logits(const T* hidden, const T* weight, Head head, KeptSets kept,
                        const bool* mask, float* logits, cudaStream_t stream) {
  if (kept.entries == 0) return;
  PLT_LAUNCH(kept_logits_kernel<T>, dim3(static_cast<unsigned>(kept.rows)),
             dim3(kKeptLogitsThreads), 0, stream, hidden, weight, head, kept, mask, logits);
}

struct ColumnGrid {
  dim3 grid, block;
};

// Blocks over (items, columns of a row of D, which may begin inside a chunk).
template <class T>
ColumnGrid column_grid(int64_t items, int size) {
  const int chunks = size / Chunk<T>::kSize + 2;
  const int threads = threads_for(chunks, kKeptLogitsThreads);
  return {
      dim3(static_cast<unsigned>(items), static_cast<unsigned>((chunks + threads - 1) / threads)),
      dim3(threads)};
}

template <class T>
void launch_kept_logits_backward_hidden(const float* grad, const T* weight, Head head,
                                        KeptSets kept, T* out, cudaStream_t stream) {
  if (kept.rows == 0) return;
  const ColumnGrid at = column_grid<T>(kept.rows, head.size);
  PLT_LAUNCH(kept_logits_backward_hidden_kernel<T>, at.grid, at.block, 0, stream, grad, weight,
             head, kept, out);
}

template <class T>
void launch_kept_logits_backward_weight(const float* grad, const int64_t* rows, const int32_t* ids,
                                        int64_t entries, const T* hidden, Head head, T* out,
                                        cudaStream_t stream) {
  if (entries == 0) return;
  const ColumnGrid at = column_grid<T>(entries, head.size);
  PLT_LAUNCH(kept_logits_backward_weight_kernel<T>, at.grid, at.block, 0, stream, grad, rows, ids,
             entries, hidden, head, out);
}

}  // namespace pyllmtune
