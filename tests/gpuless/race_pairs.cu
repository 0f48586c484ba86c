// race_pairs: two threads of a grid touch the same bytes, and something orders them or does not.
// The test knows which (test_races.py).
#include "cuda_on_cpu.h"

namespace {

enum Deed : int { kRead, kWrite, kAtomic };
enum Between : int { kNothing, kBarrier, kSyncwarp, kShuffle };

struct Side {
  unsigned block, thread;
  int deed;

  __device__ bool is_here() const { return blockIdx.x == block && threadIdx.x == thread; }
  __device__ void act(float* word) const {
    if (deed == kRead) [[maybe_unused]]
      const volatile float value = *word;
    if (deed == kWrite) *word = 1.0f;
    if (deed == kAtomic) atomicAdd(word, 1.0f);
  }
};

// `around` more barriers before and after: what they order must not reach other blocks.
__global__ void pair_kernel(float* word, Side first, Side second, int between, int around) {
  for (int i = 0; i < around; ++i) {
    __syncwarp();
    __syncthreads();
  }
  if (first.is_here()) first.act(word);
  if (between == kBarrier) __syncthreads();
  if (between == kSyncwarp) __syncwarp();
  if (between == kShuffle) __shfl_xor_sync(~0u, 1, 1);
  if (second.is_here()) second.act(word);
  for (int i = 0; i < around; ++i) {
    __syncwarp();
    __syncthreads();
  }
}

// Block 0 hands y[0] to block 1 through a counter. How: see the test.
__global__ void hand_over_kernel(float* y, int fences, int writer, int announcer) {
  PLT_SHARED(unsigned, ticket, 1);
  const int thread = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0 && thread == writer) {
    if (fences == 1) __threadfence();  // before the write: it covers nothing
    y[0] = 1.0f;
    if (fences == 2) __threadfence();
    if (fences == 3) __threadfence_block();
  }
  __syncthreads();
  if (thread == announcer) {
    if (fences == 4) __threadfence();
    ticket[0] = atomicAdd(reinterpret_cast<unsigned*>(y + 1), 1u);
  }
  __syncthreads();
  if (blockIdx.x == 1 && ticket[0] == 1 && thread == 0) y[2] = y[0];
}

struct Twelve {
  float part[3];
};

// Thread 0 reads and thread 1 writes 16 bytes of y, as one access of some kind.
__global__ void forms_kernel(float* y, const float* x, int form, int bytes) {
  if (threadIdx.x == 0) y[16] = y[2];
  if (threadIdx.x != 1) return;
  if (form == 0) *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(x);
  if (form == 1) *reinterpret_cast<Twelve*>(y) = *reinterpret_cast<const Twelve*>(x);
  if (form == 2) memcpy(y, x, 12);
  if (form == 3) memcpy(y, x, static_cast<size_t>(bytes));
  if (form == 4) memset(y, 0, static_cast<size_t>(bytes));
  if (form == 5) memmove(y, x, static_cast<size_t>(bytes));
  if (form == 6) __stcs(reinterpret_cast<float4*>(y), *reinterpret_cast<const float4*>(x));
  if (form == 7) reinterpret_cast<double*>(y)[1] = 0.0;
  if (form == 8) reinterpret_cast<char*>(y)[11] = 0;
  if (form == 9) reinterpret_cast<short*>(y)[4] = 0;
}

// Neighbouring bytes and halves of one word belong to different threads: no race.
__global__ void neighbours_kernel(unsigned char* bytes, short* halves) {
  bytes[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
  halves[threadIdx.x] = static_cast<short>(threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) reinterpret_cast<unsigned*>(bytes)[0] += bytes[1];
}

__global__ void others_local_kernel(float* y) {
  PLT_SHARED(float*, address, 1);
  float local = 1.0f;
  if (threadIdx.x == 0) address[0] = &local;
  __syncthreads();
  y[threadIdx.x] = *address[0];
}

}  // namespace

extern "C" {

int pair(float* word, int64_t blocks, int64_t threads, int64_t block1, int64_t thread1,
         int64_t deed1, int64_t block2, int64_t thread2, int64_t deed2, int64_t between,
         int64_t around) {
  const Side first{unsigned(block1), unsigned(thread1), int(deed1)};
  const Side second{unsigned(block2), unsigned(thread2), int(deed2)};
  return emu::guarded([&] {
    PLT_LAUNCH(pair_kernel, unsigned(blocks), unsigned(threads), 0, nullptr, word, first, second,
               int(between), int(around));
  });
}

int hand_over(float* y, int64_t fences, int64_t writer, int64_t announcer) {
  return emu::guarded([&] {
    PLT_LAUNCH(hand_over_kernel, 2, 64, 0, nullptr, y, int(fences), int(writer), int(announcer));
  });
}

int forms(float* y, const float* x, int64_t form) {
  return emu::guarded(
      [&] { PLT_LAUNCH(forms_kernel, 1, 32, 0, nullptr, y, x, static_cast<int>(form), 12); });
}

int neighbours(unsigned char* bytes, short* halves) {
  return emu::guarded([&] { PLT_LAUNCH(neighbours_kernel, 1, 64, 0, nullptr, bytes, halves); });
}

int others_local(float* y) {
  return emu::guarded([&] { PLT_LAUNCH(others_local_kernel, 1, 32, 0, nullptr, y); });
}

}  // extern "C"
