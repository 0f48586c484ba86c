// block: what every CUDA kernel here needs: 16-byte chunks of a row, and reductions over a block in
// a fixed order.
//
// The kernels are compiled by nvcc for the GPU and by g++ for the tests, where cuda_on_cpu.h,
// included first, runs each CUDA thread as a fiber. Only the three macros below differ; <<<>>> and
// __shared__ are spelled through them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../math/numeric.h"

#ifdef __CUDACC__
#define PLT_SHARED(T, name, N) __shared__ T name[N]
#define PLT_DYN_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char plt_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(plt_dynamic_shared)
#define PLT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

namespace pyllmtune {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// 2^x in one instruction, relative error 2^-22; results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// Where a row of an [outer, inner, V] tensor begins. 64-bit: 16,384 rows of 131,072 are 2^31.
struct RowLayout {
  uint32_t inner;
  int64_t outer_stride, inner_stride;

  __device__ int64_t offset(uint32_t row) const {
    return row / inner * outer_stride + row % inner * inner_stride;
  }
};

// Sixteen bytes, the widest access of a thread. Kept as words: unpacking waits for the load, so it
// is left to the user, who has more loads to start first.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t word[4];
};

template <class T>
__device__ inline void unpack(const Chunk<T>& chunk, float* x) {
  T element[Chunk<T>::kSize];
  memcpy(element, chunk.word, sizeof chunk);
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; ++i) x[i] = to_float(element[i]);
}
template <class T>
__device__ inline Chunk<T> pack(const float* x) {
  T element[Chunk<T>::kSize];
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; ++i) element[i] = from_float<T>(x[i]);
  Chunk<T> chunk;
  memcpy(chunk.word, element, sizeof chunk);
  return chunk;
}

// Elements from the last 16-byte boundary up to p.
template <class T>
__host__ __device__ inline int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15) / static_cast<int>(sizeof(T));
}

// True if every row begins on a 16-byte boundary.
template <class T>
inline bool rows_are_aligned(const T* p, RowLayout layout) {
  return misalignment(p) == 0 && layout.outer_stride % Chunk<T>::kSize == 0 &&
         layout.inner_stride % Chunk<T>::kSize == 0;
}

template <class T>
__device__ inline Chunk<T> load_aligned(const T* p) {
  return *reinterpret_cast<const Chunk<T>*>(p);
}

// The sixteen bytes at p, however aligned, cut out of the two aligned chunks around them. The
// second one is the next lane's first, so memory is still read once.
template <class T>
__device__ inline Chunk<T> load_across(const T* p) {
  const T* aligned = p - misalignment(p);
  const int skip = misalignment(p) * static_cast<int>(sizeof(T));  // bytes, one for a whole row
  const Chunk<T> low = load_aligned(aligned), high = load_aligned(aligned + Chunk<T>::kSize);
  uint32_t word[8] = {low.word[0],  low.word[1],  low.word[2],  low.word[3],
                      high.word[0], high.word[1], high.word[2], high.word[3]};
#pragma unroll
  for (int i = 0; i < 6; ++i) word[i] = skip & 8 ? word[i + 2] : word[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) word[i] = skip & 4 ? word[i + 1] : word[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) word[i] = skip & 2 ? word[i] >> 16 | word[i + 1] << 16 : word[i];
  return {word[0], word[1], word[2], word[3]};
}

// Elements first ... first + kSize of a row, `fill` where that is outside it. The row's alignment
// decides how they are read, never which they are, so sums over a row have one order wherever it
// lies.
template <class T>
__device__ inline Chunk<T> load_row_chunk(const T* row, int first, int length, float fill) {
  constexpr int kSize = Chunk<T>::kSize;
  const int skip = misalignment(row + first);
  if (skip == 0 && first >= 0 && first + kSize <= length) return load_aligned(row + first);
  if (first >= skip && first - skip + 2 * kSize <= length) return load_across(row + first);
  T element[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int column = first + i;
    element[i] = column >= 0 && column < length ? row[column] : from_float<T>(fill);
  }
  Chunk<T> chunk;
  memcpy(chunk.word, element, sizeof chunk);
  return chunk;
}

// The same for a store; row + first is on a 16-byte boundary.
template <class T>
__device__ inline void store_row_chunk(T* row, int first, int length, const Chunk<T>& chunk) {
  constexpr int kSize = Chunk<T>::kSize;
  if (first >= 0 && first + kSize <= length) {
    *reinterpret_cast<Chunk<T>*>(row + first) = chunk;
    return;
  }
  T element[kSize];
  memcpy(element, chunk.word, sizeof chunk);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int column = first + i;
    if (column >= 0 && column < length) row[column] = element[i];
  }
}

template <class Part>
__device__ inline Part shuffle_down(const Part& part, int offset) {
  static_assert(sizeof(Part) % 4 == 0, "moved in words");
  uint32_t word[sizeof(Part) / 4];
  memcpy(word, &part, sizeof part);
#pragma unroll
  for (size_t i = 0; i < sizeof(Part) / 4; ++i)
    word[i] = __shfl_down_sync(kAllLanes, word[i], offset);
  Part out;
  memcpy(&out, word, sizeof out);
  return out;
}

// join over the lanes of a warp, the same tree every time; lane 0 holds the result.
template <class Part, class Join>
__device__ inline Part warp_join(Part part, const Join& join) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    part = join(part, shuffle_down(part, offset));
  return part;
}

__device__ inline float warp_max(float x) {  // in every lane; no NaN
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

template <class Part>
struct alignas(8) PartBytes {
  unsigned char at[sizeof(Part)];  // __shared__ variables have no constructor
};

// One part a thread to one part a block, in a fixed order; thread 0 holds the result. `of_warp`
// joins the lanes of a warp, `empty` is its neutral element. blockDim.x is a multiple of 32. Calls
// in a row need a barrier between them.
template <class Part, class OfWarp>
__device__ inline Part block_reduce(Part part, const Part& empty, const OfWarp& of_warp) {
  PLT_SHARED(PartBytes<Part>, parts, kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  part = of_warp(part);
  if (lane == 0) memcpy(parts[warp].at, &part, sizeof part);
  __syncthreads();
  if (warp != 0) return empty;
  part = empty;
  if (lane < warps) memcpy(&part, parts[lane].at, sizeof part);
  return of_warp(part);
}

// The part of thread 0 in every thread.
template <class Part>
__device__ inline Part block_broadcast(Part part) {
  PLT_SHARED(PartBytes<Part>, shared, 1);
  if (threadIdx.x == 0) memcpy(shared[0].at, &part, sizeof part);
  __syncthreads();
  memcpy(&part, shared[0].at, sizeof part);
  return part;
}

// Threads of a block for this many pieces of work: a multiple of a warp, at most `most`.
inline int threads_for(int64_t pieces, int most) {
  const int64_t warps = (pieces + kWarp - 1) / kWarp;
  return static_cast<int>(warps < 1 ? kWarp : warps * kWarp < most ? warps * kWarp : most);
}

}  // namespace pyllmtune
