// gae: generalised advantage estimation (Schulman et al. 2016) and returns of packed sequences.
//
//   rewards, values [total] -> advantages, returns [total]; sequence i is offsets[i]:offsets[i + 1]
//   R_t = r_t + x_{t+1},  A_t = R_t - V_t,  x_t = own_t + decay_t x_{t+1}  (math/discount_flow.h)
//   Reads 8 to 10 bytes a token, writes 8. One launch, one block a sequence, chunk by chunk from
//   its end: a thread composes the maps of its 4 tokens, a warp scans over its threads by shuffles,
//   every warp applies the warps after it to what enters the chunk. Chunks are counted from the
//   beginning and tokens past the end are identities, so padding changes no bit.
//   Limits: one block walks a whole sequence, some 1 us for 1024 tokens.
#pragma once

#include "../math/discount_flow.h"
#include "block.cuh"

namespace pyllmtune {

constexpr int kGaeThreads = 256, kGaeTokens = 4;  // tokens a thread
constexpr int kGaeWarps = kGaeThreads / kWarp, kGaeChunk = kGaeThreads * kGaeTokens;

struct GaeInputs {
  int64_t total;
  const float *rewards, *values;
  const int64_t* offsets;
  const bool *mask, *terminated;           // or null, as are the next three
  const float *bootstrap, *gammas, *lams;  // one per sequence
  float gamma, lam;
  bool carry_masked;

  // Everything is loaded before anything is decided, so that the loads overlap.
  __device__ RewardToken<float> load(int64_t t) const {
    const float reward = rewards[t], value = values[t];
    const bool selected = mask == nullptr ? true : mask[t];
    const bool ends = terminated == nullptr ? false : terminated[t];
    return {selected, selected && ends, selected ? reward : 0.0f, selected ? value : 0.0f};
  }
};

// Of the lanes after this one, the last lane's first.
__device__ inline Flow<float> flow_after_lane(Flow<float> mine) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const Flow<float> late = shuffle_down(mine, offset);
    if (lane + offset < kWarp) mine = compose(mine, late);
  }
  const Flow<float> after = shuffle_down(mine, 1);
  return lane + 1 < kWarp ? after : identity_flow<float>();
}

__global__ void __launch_bounds__(kGaeThreads)
    gae_kernel(GaeInputs in, float* __restrict__ advantages, float* __restrict__ returns) {
  PLT_SHARED(Flow<float>, of_warp, kGaeWarps);
  PLT_SHARED(float, leaving, 1);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t sequence = blockIdx.x;
  // clamped: offsets on a GPU are not checked, and must not lead outside the tokens
  const int64_t begin = min(max(in.offsets[sequence], int64_t(0)), in.total);
  const int64_t end = min(in.offsets[sequence + 1], in.total);
  const Discount<float> by{in.gammas == nullptr ? in.gamma : in.gammas[sequence],
                           in.lams == nullptr ? in.lam : in.lams[sequence]};
  float entering = in.bootstrap == nullptr ? 0.0f : by.gamma * in.bootstrap[sequence];

  const int64_t chunks = (end - begin + kGaeChunk - 1) / kGaeChunk;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t first = begin + chunk * kGaeChunk + threadIdx.x * kGaeTokens;
    RewardToken<float> token[kGaeTokens];
    Flow<float> flow[kGaeTokens];
#pragma unroll
    for (int i = 0; i < kGaeTokens; ++i) {
      const bool inside = first + i < end;
      token[i] = inside ? in.load(first + i) : RewardToken<float>{false, false, 0.0f, 0.0f};
      flow[i] = inside ? token_flow(token[i], by, in.carry_masked) : identity_flow<float>();
    }
    Flow<float> mine = flow[kGaeTokens - 1];
#pragma unroll
    for (int i = kGaeTokens - 2; i >= 0; --i) mine = compose(flow[i], mine);

    const Flow<float> after = flow_after_lane(mine);
    if (lane == 0) of_warp[warp] = compose(mine, after);
    __syncthreads();
    float x = entering;
    for (int later = kGaeWarps - 1; later > warp; --later) x = of_warp[later](x);
    x = after(x);
#pragma unroll
    for (int i = kGaeTokens - 1; i >= 0; --i) {
      if (first + i < end) {
        const float result = token_return(token[i], x);
        returns[first + i] = token[i].selected ? result : 0.0f;
        advantages[first + i] = token[i].selected ? result - token[i].value : 0.0f;
      }
      x = flow[i](x);
    }
    if (threadIdx.x == 0) leaving[0] = x;
    __syncthreads();  // also keeps `of_warp` until every warp has read it
    entering = leaving[0];
  }
}

inline void launch_gae(const GaeInputs& in, int64_t sequences, float* advantages, float* returns,
                       cudaStream_t stream) {
  if (sequences == 0 || in.total == 0) return;
  PLT_LAUNCH(gae_kernel, dim3(static_cast<unsigned>(sequences)), dim3(kGaeThreads), 0, stream, in,
             advantages, returns);
}

}  // namespace pyllmtune
