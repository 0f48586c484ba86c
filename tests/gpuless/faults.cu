// faults: kernels with one planted mistake each. A checker that lets its own pass is dead
// (test_cuda_on_cpu.py).
//
// Every entry takes x [256] and y [256] with x[i] = i; what a correct kernel would leave in y is
// said beside it.
#include "cuda_on_cpu.h"

namespace {

// y = x reversed. Nothing orders the exchange.
__global__ void missing_barrier_kernel(const float* x, float* y) {
  PLT_SHARED(float, tile, 256);
  const unsigned t = threadIdx.x;
  tile[t] = x[t];
  y[t] = tile[255 - t];
}

// y = x. The second exchange is not ordered, though barriers stand before and after it.
__global__ void race_between_barriers_kernel(const float* x, float* y) {
  PLT_SHARED(float, tile, 256);
  const unsigned t = threadIdx.x;
  tile[t] = x[t];
  __syncthreads();
  const float once = tile[255 - t];
  __syncthreads();
  tile[t] = once;
  const float twice = tile[255 - t];
  __syncthreads();
  y[t] = twice;
}

// y = x reversed in each warp. The shuffle makes the lanes meet but orders no memory.
__global__ void missing_syncwarp_kernel(const float* x, float* y) {
  PLT_SHARED(float, tile, 256);
  const unsigned t = threadIdx.x;
  tile[t] = x[t];
  const float own = __shfl_sync(~0u, x[t], static_cast<int>(t % 32));
  y[t] = tile[t ^ 31] + 0.0f * own;
}

// The same, between two __syncwarp.
__global__ void race_between_syncwarps_kernel(const float* x, float* y) {
  PLT_SHARED(float, tile, 256);
  const unsigned t = threadIdx.x;
  __syncwarp();
  tile[t] = x[t];
  const float own = __shfl_sync(~0u, x[t], static_cast<int>(t % 32));
  const float other = tile[t ^ 31];
  __syncwarp();
  y[t] = other + 0.0f * own;
}

// Both blocks write y[0].
__global__ void two_blocks_one_word_kernel(const float* x, float* y) {
  if (threadIdx.x == 0) y[0] = x[blockIdx.x];
}

// The same between barriers, which order the threads of one block only.
__global__ void two_blocks_between_barriers_kernel(const float* x, float* y) {
  __syncthreads();
  __syncwarp();
  if (threadIdx.x == 0) y[0] = x[blockIdx.x];
  __syncwarp();
  __syncwarp();
  __syncthreads();
  __syncthreads();
}

// Block 1 reads what block 0 wrote, told so by the ticket, but without a fence between value and
// ticket.
__global__ void missing_threadfence_kernel(const float* x, float* y) {
  PLT_SHARED(unsigned, order, 1);
  if (threadIdx.x == 0) {
    y[blockIdx.x] = x[blockIdx.x];
    order[0] = atomicAdd(reinterpret_cast<unsigned*>(y + 255), 1u);
  }
  __syncthreads();
  if (threadIdx.x == 0 && order[0] == gridDim.x - 1) y[2] = y[0] + y[1];
}

__global__ void global_read_past_end_kernel(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x + 1];
}

__global__ void shared_write_past_end_kernel(const float* x, float* y) {
  PLT_SHARED(float, tile, 256);
  tile[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void dynamic_shared_past_end_kernel(const float* x, float* y) {
  PLT_DYN_SHARED(float, tile);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned_vector_kernel(const float* x, float* y) {
  const unsigned t = threadIdx.x;
  if (t < 32) y[t] = reinterpret_cast<const float4*>(x + 1)[t].x;
}

// An array of floats need not lie on 16 bytes in shared memory.
__global__ void misaligned_shared_vector_kernel(const float* x, float* y) {
  PLT_SHARED(float, tile, 256);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 64) y[threadIdx.x] = reinterpret_cast<const float4*>(tile)[threadIdx.x].x;
}

__global__ void divergent_barriers_kernel(const float* x, float* y) {
  if (threadIdx.x < 128) {
    __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
  } else {
    __syncthreads();
  }
}

// Half of the warp waits for the other half, which waits for the block.
__global__ void deadlock_kernel(const float* x, float* y) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    y[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
  }
}

__global__ void own_lane_not_in_mask_kernel(const float* x, float* y) {
  y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1);
}

__global__ void exited_lanes_in_mask_kernel(const float* x, float* y) {
  if (threadIdx.x >= 250) return;
  y[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
}

__global__ void shuffle_outside_mask_kernel(const float* x, float* y) {
  if (threadIdx.x % 32 >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 16);
}

// y = x, but the second half of the tile is never written.
__global__ void unwritten_shared_kernel(const float* x, float* y) {
  PLT_SHARED(float, tile, 256);
  if (threadIdx.x < 128) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

// y = x, but a local is not set in the second half.
__global__ void unwritten_local_kernel(const float* x, float* y) {
  float value;
  if (threadIdx.x < 128) value = x[threadIdx.x];
  y[threadIdx.x] = value;
}

// y[0] = the sum of 1 / (1 + x), rounded in the order in which the threads happen to come.
__global__ void order_dependent_sum_kernel(const float* x, float* y) {
  atomicAdd(y, 1.0f / (1.0f + x[threadIdx.x]));
}

}  // namespace

#define FAULT(name, blocks, threads, smem)                                                         \
  extern "C" int name(const float* x, float* y) {                                                  \
    return emu::guarded([&] { PLT_LAUNCH(name##_kernel, blocks, threads, smem, nullptr, x, y); }); \
  }
FAULT(missing_barrier, 1, 256, 0)
FAULT(race_between_barriers, 1, 256, 0)
FAULT(missing_syncwarp, 1, 256, 0)
FAULT(race_between_syncwarps, 1, 256, 0)
FAULT(two_blocks_one_word, 2, 32, 0)
FAULT(two_blocks_between_barriers, 2, 32, 0)
FAULT(missing_threadfence, 2, 32, 0)
FAULT(global_read_past_end, 1, 256, 0)
FAULT(shared_write_past_end, 1, 256, 0)
FAULT(dynamic_shared_past_end, 1, 256, 255 * sizeof(float))
FAULT(misaligned_vector, 1, 32, 0)
FAULT(misaligned_shared_vector, 1, 256, 0)
FAULT(divergent_barriers, 1, 256, 0)
FAULT(deadlock, 1, 256, 0)
FAULT(own_lane_not_in_mask, 1, 256, 0)
FAULT(exited_lanes_in_mask, 1, 256, 0)
FAULT(shuffle_outside_mask, 1, 32, 0)
FAULT(unwritten_shared, 1, 256, 0)
FAULT(unwritten_local, 1, 256, 0)
FAULT(order_dependent_sum, 1, 256, 0)

// Launches that a GPU refuses.
extern "C" int too_many_threads(const float* x, float* y) {
  return emu::guarded([&] { PLT_LAUNCH(missing_barrier_kernel, 1, 1025, 0, nullptr, x, y); });
}
extern "C" int empty_grid(const float* x, float* y) {
  return emu::guarded([&] { PLT_LAUNCH(missing_barrier_kernel, 0, 256, 0, nullptr, x, y); });
}
extern "C" int shared_memory_not_asked_for(const float* x, float* y) {
  return emu::guarded(
      [&] { PLT_LAUNCH(dynamic_shared_past_end_kernel, 1, 256, 64 << 10, nullptr, x, y); });
}
