// clean_softmax: a correct kernel in the style of the project's; a control for the emulator and for
// the gates.
#include "cuda/block.cuh"
#include "cuda_on_cpu.h"

namespace {

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void store(float* to, float x) { *to = x; }
__device__ void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <int kThreads, class Combine>
__device__ float block_reduce(float x, float* scratch, Combine combine) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
  const int warp = threadIdx.x / 32;
  __syncthreads();  // the scratch of the reduction before this one has been read
  if (threadIdx.x % 32 == 0) scratch[warp] = x;
  __syncthreads();
  x = scratch[0];
  for (int i = 1; i < kThreads / 32; ++i) x = combine(x, scratch[i]);
  return x;
}

struct SoftmaxShape {
  int64_t columns;
  float inverse_temperature;
};

// x, y [gridDim.x, columns], 16-byte aligned rows; 16-byte accesses, three reads of x.
template <class T, int kThreads>
__global__ void softmax_kernel(const T* __restrict__ x, T* __restrict__ y, SoftmaxShape shape) {
  constexpr int kVector = 16 / sizeof(T);
  PLT_SHARED(float, scratch, kThreads / 32);
  x += blockIdx.x * shape.columns;
  y += blockIdx.x * shape.columns;
  const auto for_each_vector = [&](auto visit) {
    for (int64_t i = threadIdx.x * kVector; i < shape.columns; i += kThreads * kVector) {
      const uint4 packed = __ldcs(reinterpret_cast<const uint4*>(x + i));
      visit(i, reinterpret_cast<const T*>(&packed));
    }
  };
  float largest = -INFINITY;
  for_each_vector([&](int64_t, const T* values) {
    for (int j = 0; j < kVector; ++j) largest = fmaxf(largest, to_float(values[j]));
  });
  largest = block_reduce<kThreads>(largest, scratch, Max());
  float sum = 0.0f;
  for_each_vector([&](int64_t, const T* values) {
    for (int j = 0; j < kVector; ++j)
      sum += __expf((to_float(values[j]) - largest) * shape.inverse_temperature);
  });
  sum = block_reduce<kThreads>(sum, scratch, Add());
  for_each_vector([&](int64_t i, const T* values) {
    uint4 packed;
    T* results = reinterpret_cast<T*>(&packed);
    for (int j = 0; j < kVector; ++j)
      store(results + j, __expf((to_float(values[j]) - largest) * shape.inverse_temperature) / sum);
    __stcs(reinterpret_cast<uint4*>(y + i), packed);
  });
}

template <class T>
void launch_softmax(const T* x, T* y, int64_t rows, int64_t columns, float temperature) {
  const SoftmaxShape shape{columns, 1.0f / temperature};
  PLT_LAUNCH((softmax_kernel<T, 256>), static_cast<unsigned>(rows), 256, 0, nullptr, x, y, shape);
}

}  // namespace

extern "C" {

int softmax_float32(const float* x, float* y, int64_t rows, int64_t columns, double temperature) {
  return emu::guarded(
      [&] { launch_softmax(x, y, rows, columns, static_cast<float>(temperature)); });
}
int softmax_float16(const __half* x, __half* y, int64_t rows, int64_t columns, double temperature) {
  return emu::guarded(
      [&] { launch_softmax(x, y, rows, columns, static_cast<float>(temperature)); });
}
int softmax_bfloat16(const __nv_bfloat16* x, __nv_bfloat16* y, int64_t rows, int64_t columns,
                     double temperature) {
  return emu::guarded(
      [&] { launch_softmax(x, y, rows, columns, static_cast<float>(temperature)); });
}

}  // extern "C"
