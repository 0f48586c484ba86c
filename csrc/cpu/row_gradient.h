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

// The row's maximum and sum, as backward needs them. p = e^d / sum: a large p keeps every digit,
// which e^(d - log sum) would not.
template <class F>
struct RowSum {
  F max, inverse, log;
};

// `target` is y counted from z, and may lie outside. `chain(dz, z)` is what is stored. `out` may be
// `z`.
template <class V, class T, class Out, class Chain = Unchanged>
void stripe_gradient(const T* z, Out* out, int64_t n, RowSum<typename V::Scalar> sum,
                     typename V::Scalar inv_temperature, ScoreGradient<typename V::Scalar> grad,
                     int64_t target, const Chain& chain = Chain()) {
  using F = typename V::Scalar;
  const F of_max = grad.constant - grad.slope * sum.log;  // what p is multiplied by at the maximum
  const V base(sum.max), scale(inv_temperature * F(kLog2E)), inverse(sum.inverse);
  const V constant(of_max), slope(grad.slope * F(kLn2));
  auto gradient = [&](V logits) {
    V y = (logits - base) * scale;
    const V e = exp2_nonpositive(y);
    return chain(e * inverse * fma_of(slope, y, constant), logits);
  };
  const bool here = target >= 0 && target < n;
  const F target_logit = here ? to_scalar(z[target]) : F(0);  // before `out` covers it
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) store(out + i, gradient(load(z + i)));
  if (i < n) store_first(out + i, gradient(load_first(z + i, n - i, F(0))), n - i);
  if (!here) return;
  const F d = (target_logit - sum.max) * inv_temperature, p = exp_of(d) * sum.inverse;
  const F others = p > F(0) || p != p ? p * (of_max + grad.slope * d) : F(0);
  from_scalar(reduce_max(chain(V(others + grad.at_target), V(target_logit))), out + target);
}

}  // namespace pyllmtune
