// row_gradient: gradient of a stripe of logits from four scalars of its row.
//
//   dz_j = p_j (constant + slope log p_j) + 1[j = y] at_target     (csrc/math/online_softmax.h)
#pragma once

#include "../math/online_softmax.h"
#include "row_stats.h"
#include "types.h"

namespace pyllmtune {

struct Unchanged {
  template <class V>
  V operator()(V gradient, V) const {
    return gradient;
  }
};

// `target` is y counted from z, and may lie outside. `chain(dz, z)` is what is stored. `out` may be
// `z`.
template <class V, class T, class Out, class Chain = Unchanged>
void stripe_gradient(const T* z, Out* out, int64_t n, typename V::Scalar top,
                     typename V::Scalar log_sum, typename V::Scalar inv_temperature,
                     ScoreGradient<typename V::Scalar> grad, int64_t target,
                     const Chain& chain = Chain()) {
  using F = typename V::Scalar;
  const V base(top), scale(inv_temperature * F(kLog2E)), offset(-log_sum * F(kLog2E));
  const V constant(grad.constant), slope(grad.slope * F(kLn2));
  auto gradient = [&](V logits) {
    V y = fma_of(logits - base, scale, offset);  // log2 p
    const V p = exp2_nonpositive(y);
    return chain(p * fma_of(slope, y, constant), logits);
  };
  const bool here = target >= 0 && target < n;
  const F target_logit = here ? to_scalar(z[target]) : F(0);  // before `out` covers it
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) store(out + i, gradient(load(z + i)));
  if (i < n) store_first(out + i, gradient(load_first(z + i, n - i, F(0))), n - i);
  if (!here) return;
  const F log_p = (target_logit - top) * inv_temperature - log_sum;
  const F p = exp_of(log_p);
  const F others = p > F(0) || p != p ? p * (grad.constant + grad.slope * log_p) : F(0);
  from_scalar(reduce_max(chain(V(others + grad.at_target), V(target_logit))), out + target);
}

}  // namespace pyllmtune
