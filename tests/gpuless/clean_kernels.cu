// clean_kernels: correct kernels, one for each feature of CUDA; the emulator must stay silent.
#include "cuda/block.cuh"
#include "cuda_on_cpu.h"

namespace {

// y = x reversed in each block, twice through shared memory.
__global__ void reverse_twice_kernel(const float* x, float* y) {
  PLT_SHARED(float, tile, 256);
  const unsigned t = threadIdx.x, i = blockIdx.x * 256 + t;
  tile[t] = x[i];
  __syncthreads();
  const float once = tile[255 - t];
  __syncthreads();
  tile[t] = once;
  __syncthreads();
  y[i] = tile[255 - t];
}

// y = x reversed in each warp, through shared memory.
__global__ void reverse_warp_kernel(const float* x, float* y) {
  PLT_SHARED(float, tile, 256);
  const unsigned t = threadIdx.x, i = blockIdx.x * 256 + t;
  tile[t] = x[i];
  __syncwarp();
  const float other = tile[t ^ 31];
  __syncwarp();
  tile[t] = other;
  __syncwarp();
  y[i] = tile[t];
}

// y[0] = sum of x: each block leaves a partial sum, the last block to finish adds them up in order.
__global__ void ticket_sum_kernel(const float* x, float* partial, unsigned* ticket, float* y) {
  PLT_SHARED(float, scratch, 8);
  PLT_SHARED(bool, is_last, 1);
  float sum = x[blockIdx.x * 256 + threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.0f;
    for (int warp = 0; warp < 8; ++warp) sum += scratch[warp];
    partial[blockIdx.x] = sum;
    __threadfence();
    is_last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0] || threadIdx.x != 0) return;
  float total = 0.0f;
  for (unsigned block = 0; block < gridDim.x; ++block) total += partial[block];
  y[0] = total;
}

// counts[16] of the values of x, and their sum in single and double precision.
__global__ void atomics_kernel(const int* x, int* counts, float* sum, double* exact_sum) {
  PLT_DYN_SHARED(int, local);
  const unsigned t = threadIdx.x;
  if (t < 16) local[t] = 0;
  __syncthreads();
  const int value = x[blockIdx.x * 256 + t];
  atomicAdd(&local[value], 1);
  atomicAdd(sum, static_cast<float>(value));
  atomicAdd(exact_sum, value);
  __syncthreads();
  if (t < 16) atomicAdd(&counts[t], local[t]);
}

// out [11, 32]: a row for each operation, over a warp that holds x[32].
__global__ void warp_operations_kernel(const int* x, int* out) {
  const unsigned lane = threadIdx.x;
  const int v = x[lane];
  int row = 0;
  const auto put = [&](auto result) { out[32 * row++ + lane] = static_cast<int>(result); };
  put(__shfl_sync(~0u, v, 5, 8));
  put(__shfl_up_sync(~0u, v, 3));
  put(__shfl_down_sync(~0u, v, 3, 16));
  put(__shfl_xor_sync(~0u, v, 9));
  put(__ballot_sync(~0u, v > 0));
  put(__any_sync(~0u, v > 100));
  put(__all_sync(~0u, v < 100));
  put(__match_any_sync(~0u, v));
  put(__reduce_min_sync(~0u, v));
  put(__reduce_add_sync(~0u, static_cast<unsigned>(v)));
  put(__syncthreads_count(v > 0));
}

// A block that is not a multiple of 32: the last warp's full mask means the lanes that exist.
__global__ void partial_warp_kernel(float* y) {
  y[threadIdx.x] = __shfl_sync(~0u, static_cast<float>(threadIdx.x), 0);
}

// A result of each kind of intrinsic: real[7] and integral[6] a thread, from x and n.
__global__ void intrinsics_kernel(const float* x, const unsigned long long* n, float* real,
                                  unsigned long long* integral) {
  const unsigned t = threadIdx.x;
  const float v = __ldg(x + t);
  const unsigned long long m = n[t];
  const __half half = __shfl_xor_sync(~0u, __float2half_rn(v), 1);
  const __nv_bfloat16 brain = __shfl_down_sync(~0u, __float2bfloat16_rn(v), 1);
  const float reals[] = {__expf(v),
                         exp2f(v),
                         __log2f(fmaxf(v, 1.0f)),
                         rsqrtf(v * v + 1.0f),
                         __half2float(half),
                         __bfloat162float(brain),
                         max(v, NAN)};
  const unsigned long long integers[] = {__umul64hi(m, ~m),
                                         __umulhi(unsigned(m), 0x9e3779b9u),
                                         static_cast<unsigned>(__popcll(m)),
                                         static_cast<unsigned>(__clzll(static_cast<long long>(m))),
                                         __float_as_uint(v),
                                         min(m, 1000000ull) + isnan(v)};
  for (int i = 0; i < 7; ++i) real[7 * t + i] = reals[i];
  for (int i = 0; i < 6; ++i) integral[6 * t + i] = integers[i];
}

// y[i] = x[i] + 1 over a grid of three dimensions of blocks of three dimensions.
__global__ void three_dimensions_kernel(const float* x, float* y) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  y[i] = x[i] + 1.0f;
}

}  // namespace

extern "C" {

int reverse_twice(const float* x, float* y, int64_t blocks) {
  return emu::guarded([&] {
    PLT_LAUNCH(reverse_twice_kernel, static_cast<unsigned>(blocks), 256, 0, nullptr, x, y);
  });
}

int reverse_warp(const float* x, float* y, int64_t blocks) {
  return emu::guarded([&] {
    PLT_LAUNCH(reverse_warp_kernel, static_cast<unsigned>(blocks), 256, 0, nullptr, x, y);
  });
}

int ticket_sum(const float* x, float* partial, unsigned* ticket, float* y, int64_t blocks) {
  return emu::guarded([&] {
    cudaMemsetAsync(ticket, 0, sizeof *ticket, nullptr);
    PLT_LAUNCH(ticket_sum_kernel, static_cast<unsigned>(blocks), 256, 0, nullptr, x, partial,
               ticket, y);
    return cudaGetLastError();
  });
}

int atomics(const int* x, int* counts, float* sum, double* exact_sum, int64_t blocks) {
  return emu::guarded([&] {
    int device, bytes = 0;  // far more than is used: only after asking for it
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaFuncSetAttribute(atomics_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    PLT_LAUNCH(atomics_kernel, static_cast<unsigned>(blocks), 256, bytes, nullptr, x, counts, sum,
               exact_sum);
  });
}

int warp_operations(const int* x, int* out) {
  return emu::guarded([&] { PLT_LAUNCH(warp_operations_kernel, 1, 32, 0, nullptr, x, out); });
}

int partial_warp(float* y, int64_t threads) {
  return emu::guarded(
      [&] { PLT_LAUNCH(partial_warp_kernel, 1, static_cast<unsigned>(threads), 0, nullptr, y); });
}

int intrinsics(const float* x, const unsigned long long* n, float* real,
               unsigned long long* integral) {
  return emu::guarded(
      [&] { PLT_LAUNCH(intrinsics_kernel, 1, 32, 0, nullptr, x, n, real, integral); });
}

int three_dimensions(const float* x, float* y) {
  return emu::guarded(
      [&] { PLT_LAUNCH(three_dimensions_kernel, dim3(2, 3, 4), dim3(4, 2, 2), 0, nullptr, x, y); });
}

}  // extern "C"
