// gate_faults: what the compile gates must notice, switched on by flags of the compiler
// (test_compile_gates.py).
#include "cuda_on_cpu.h"

// y = x. LOSE_VECTORS reads and writes four bytes at a time.
__global__ void copy_kernel(const uint4* x, uint4* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
#ifdef LOSE_VECTORS
  for (int word = 0; word < 4; ++word)
    reinterpret_cast<volatile unsigned*>(y)[4 * i + word] =
        reinterpret_cast<const volatile unsigned*>(x)[4 * i + word];
#else
  y[i] = x[i];
#endif
}

// Holds 80 values a thread: too many for -maxrregcount=32, and for 1024 threads of a block.
__global__ void many_registers_kernel(const float* x, float* y) {
  float value[80], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 80; ++i) sum += value[i] = x[1024 * i + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 80; ++i) y[1024 * i + threadIdx.x] = value[i] / sum;
}
