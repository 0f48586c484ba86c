// row_stats: what a thread keeps of a row of logits, and what turns a logit into its gradient
// (csrc/math/online_softmax.h has the formulas).
#pragma once

#include "../math/online_softmax.h"
#include "block.cuh"

namespace pyllmtune {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
// 2^-200 is 0 in float: a finite stand-in for exponents of -inf, since 0 * -inf would be NaN
constexpr float kLowestExponent = -200.0f;

// Statistics of some elements of a row, as SoftmaxStats, but `weighted` has its exponents in bits.
struct PartStats {
  float max, sum, weighted;

  // Makes `top` the reference, which is max or more. fmaxf turns -inf - -inf, NaN, into the finite
  // stand-in as well.
  __device__ void rebase(float top, float bits_per_logit) {
    const float shift = fmaxf((max - top) * bits_per_logit, kLowestExponent);
    const float scale = exp2_fast(shift);
    weighted = scale * (weighted + shift * sum);
    sum *= scale;
    max = top;
  }

  template <int N>
  __device__ void add(const float (&z)[N], float bits_per_logit) {
    float top = z[0];
#pragma unroll
    for (int i = 1; i < N; ++i) top = fmaxf(top, z[i]);
    if (top > max) rebase(top, bits_per_logit);
    // fmaxf dropped a NaN, but NaN - base is NaN and stays in sum; +inf becomes inf - inf. As long
    // as nothing is allowed, any finite base keeps -inf at 0.
    const float base = max == -INFINITY ? 0.0f : max;
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float exponent = (z[i] - base) * bits_per_logit;
      const float e = exp2_fast(exponent);
      part += e;
      weighted += e * fmaxf(exponent, kLowestExponent);
    }
    sum += part;
  }

  // merge() of online_softmax.h takes two exponentials a step; one common maximum takes one in all.
  __device__ PartStats of_warp(float bits_per_logit) {
    rebase(warp_max(max), bits_per_logit);
    return warp_join(*this, [](const PartStats& a, const PartStats& b) {
      return PartStats{a.max, a.sum + b.sum, a.weighted + b.weighted};
    });
  }
};

// What turns a logit of one row into its gradient.
struct RowGradient {
  float max, bits_per_logit, log2_sum, constant, slope_per_bit;

  __device__ float operator()(float z) const {
    const float log2_p = (z - max) * bits_per_logit - log2_sum;
    return exp2_fast(log2_p) * (constant + slope_per_bit * fmaxf(log2_p, kLowestExponent));
  }
};

__device__ inline RowGradient row_gradient(float max, float log_sum, float inv_temperature,
                                           const ScoreGradient<float>& grad) {
  return {max, inv_temperature * kLog2E, log_sum * kLog2E, grad.constant, grad.slope * kLn2};
}

}  // namespace pyllmtune
