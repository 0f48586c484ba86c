// simd: the vector in which every CPU kernel computes, sixteen floats wide on every instruction
// set.
//
// The width is fixed so that sums are formed in the same order, and give the same bits, under AVX2
// and AVX-512. Kernels are templates over the vector V: F32x16, or F64x1 for float64 (one lane, the
// C library's exp: it serves gradcheck).
//   V::Scalar, V::kWidth, load(p), load_first(p, n, fill), store(p, x), store_first(p, x, n),
//   fma_of, max_of, select, ...
// A NaN passes through exp2_nonpositive and exp_of; max_of(a, b) drops a NaN in `a` and keeps one
// in `b`.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../math/numeric.h"

namespace pyllmtune {
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
}  // namespace pyllmtune

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace pyllmtune {

// The first n < 16 elements, the other lanes `fill`. Through a small buffer: a tail is one vector
// in a thousand.
template <class T>
inline F32x16 load_first(const T* p, int64_t n, float fill) {
  T buffer[16];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, p, n * sizeof(T));
  return select(first_lanes(static_cast<int>(n)), load(buffer), F32x16(fill));
}
inline Mask16 load_mask_first(const bool* p, int64_t n) {
  bool buffer[16] = {};
  memcpy(buffer, p, n);
  return load_mask(buffer);
}
template <class T>
inline void store_first(T* p, F32x16 x, int64_t n) {
  T buffer[16];
  store(buffer, x);
  memcpy(p, buffer, n * sizeof(T));
}

constexpr float kShift =
    12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits

// 2^y for y <= 0. At and below -127 it is exactly 0 and `y` itself is raised to -127, so that 2^y *
// y is 0 and not NaN. The polynomial is minimax of degree 6 on [-1/2, 1/2]: 2e-9 relative, 8e-8
// with float rounding.
inline F32x16 exp2_nonpositive(F32x16& y) {
  y = max_of(F32x16(-127.0f), y);
  const F32x16 shifted = y + F32x16(kShift);
  const F32x16 f = y - (shifted - F32x16(kShift));
  F32x16 p(0.00015353362f);
  p = fma_of(p, f, F32x16(0.0013398874f));
  p = fma_of(p, f, F32x16(0.009618437f));
  p = fma_of(p, f, F32x16(0.055503324f));
  p = fma_of(p, f, F32x16(0.24022648f));
  p = fma_of(p, f, F32x16(0.6931472f));
  p = fma_of(p, f, F32x16(1.0f));
  return p * pow2_of_shifted(shifted);
}

// p 2^n for an integer n: in two halves, so that neither end of the range is lost. AVX-512 has an
// instruction with the same results.
template <class V>
inline V times_pow2(V p, V n) {
  const V half = fma_of(n, V(0.5f), V(kShift));
  return p * pow2_of_shifted(half) * pow2_of_shifted(n - (half - V(kShift)) + V(kShift));
}

// e^x over the whole range: 0 below -104, inf above 88.73; 1 ulp. ln 2 is subtracted in two parts
// (Cody and Waite). The residual takes its digits from the polynomial where n = 0, |x| < 0.34, and
// beyond from e^x: 5e-7 relative, 1.2e-6 just beyond.
inline ExpPair<F32x16> exp_pair(F32x16 x) {
  const F32x16 one(1.0f), held = min_of(F32x16(89.0f), max_of(F32x16(-104.0f), x));
  const F32x16 n = fma_of(held, F32x16(1.44269504f), F32x16(kShift)) - F32x16(kShift);
  F32x16 f = fma_of(n, F32x16(-0.693145752f), held);
  f = fma_of(n, F32x16(-1.42860677e-6f), f);
  F32x16 q(0.0013814613f);  // (e^f - 1 - f) / f^2
  q = fma_of(q, f, F32x16(0.00836871f));
  q = fma_of(q, f, F32x16(0.04166839f));
  q = fma_of(q, f, F32x16(0.16666521f));
  q = fma_of(q, f, F32x16(0.49999994f));
  const F32x16 value = times_pow2(fma_of(fma_of(q, f, one), f, one), n);
  return {value, select(n == F32x16(0.0f), q * f * f, value - one - x)};
}
inline F32x16 exp_of(F32x16 x) { return exp_pair(x).value; }

// tanh x, 2 ulp: Cephes' polynomial near 0, where 1 - 2 / (e^2x + 1) loses its digits.
inline F32x16 tanh_of(F32x16 x) {
  const F32x16 zero(0.0f), one(1.0f), size = max_of(x, zero - x), square = x * x;
  const F32x16 far = one - F32x16(2.0f) / (exp_of(size + size) + one);
  F32x16 p(-5.70498872745e-3f);
  p = fma_of(p, square, F32x16(2.06390887954e-2f));
  p = fma_of(p, square, F32x16(-5.37397155531e-2f));
  p = fma_of(p, square, F32x16(1.33314422036e-1f));
  p = fma_of(p, square, F32x16(-3.33332819422e-1f));
  return select(size < F32x16(0.625f), fma_of(p * square, x, x), select(x < zero, zero - far, far));
}

// ln x for normal x > 0, 1 ulp: Cephes' polynomial of the mantissa in [sqrt(1/2), sqrt(2)). What it
// returns for 0, subnormal, negative and NaN is of no use.
inline F32x16 log_of(F32x16 x) {
  F32x16 e = exponent_of(x), m = mantissa_of(x);
  const Mask16 high = m > F32x16(1.41421356f);
  e = select(high, e + F32x16(1.0f), e);
  const F32x16 f = select(high, m * F32x16(0.5f), m) - F32x16(1.0f);
  F32x16 p(7.0376836292e-2f);
  p = fma_of(p, f, F32x16(-1.1514610310e-1f));
  p = fma_of(p, f, F32x16(1.1676998740e-1f));
  p = fma_of(p, f, F32x16(-1.2420140846e-1f));
  p = fma_of(p, f, F32x16(1.4249322787e-1f));
  p = fma_of(p, f, F32x16(-1.6668057665e-1f));
  p = fma_of(p, f, F32x16(2.0000714765e-1f));
  p = fma_of(p, f, F32x16(-2.4999993993e-1f));
  p = fma_of(p, f, F32x16(3.3333331174e-1f));
  const F32x16 square = f * f;
  F32x16 y = fma_of(p * f, square, e * F32x16(-2.12194440e-4f));
  y = fma_of(square, F32x16(-0.5f), y);
  return fma_of(e, F32x16(0.693359375f), f + y);
}

// float64: one lane. The names are those of F32x16.
struct F64x1 {
  using Scalar = double;
  static constexpr int kWidth = 1;
  double v;

  F64x1() = default;
  explicit F64x1(double value) : v(value) {}
};
inline F64x1 operator+(F64x1 a, F64x1 b) { return F64x1(a.v + b.v); }
inline F64x1 operator-(F64x1 a, F64x1 b) { return F64x1(a.v - b.v); }
inline F64x1 operator*(F64x1 a, F64x1 b) { return F64x1(a.v * b.v); }
inline F64x1 operator/(F64x1 a, F64x1 b) { return F64x1(a.v / b.v); }
inline F64x1 fma_of(F64x1 a, F64x1 b, F64x1 c) { return F64x1(a.v * b.v + c.v); }
inline F64x1 max_of(F64x1 a, F64x1 b) { return F64x1(a.v > b.v ? a.v : b.v); }
inline F64x1 min_of(F64x1 a, F64x1 b) { return F64x1(a.v < b.v ? a.v : b.v); }
inline bool operator<(F64x1 a, F64x1 b) { return a.v < b.v; }
inline bool operator>(F64x1 a, F64x1 b) { return a.v > b.v; }
inline bool operator>=(F64x1 a, F64x1 b) { return a.v >= b.v; }
inline bool operator==(F64x1 a, F64x1 b) { return a.v == b.v; }
inline F64x1 select(bool m, F64x1 yes, F64x1 no) { return m ? yes : no; }
inline int count(bool m) { return m; }
inline F64x1 load(const double* p) { return F64x1(*p); }
inline F64x1 load_first(const double*, int64_t, double fill) { return F64x1(fill); }
inline void store(double* p, F64x1 x) { *p = x.v; }
inline void store_first(double*, F64x1, int64_t) {}
inline double reduce_sum(F64x1 x) { return x.v; }
inline double reduce_max(F64x1 x) { return x.v; }
inline void stream(double* p, F64x1 x) { store(p, x); }
inline F64x1 exp_of(F64x1 x) { return F64x1(exp(x.v)); }
inline F64x1 tanh_of(F64x1 x) { return F64x1(tanh(x.v)); }
inline F64x1 log_of(F64x1 x) { return F64x1(log(x.v)); }
inline F64x1 exp2_nonpositive(F64x1& y) {
  y.v = y.v < -1100.0 ? -1100.0 : y.v;
  return F64x1(y.v == -1100.0 ? 0.0 : exp2(y.v));
}
template <>
inline F64x1 small_exp_residual<F64x1>(F64x1 x) {
  return F64x1(expm1(x.v) - x.v);
}
template <>
inline F64x1 small_log_residual<F64x1>(F64x1 x) {
  return F64x1(x.v - log1p(x.v));
}

// The vector in which elements of type T are computed.
template <class T>
struct VectorOf {
  using type = F32x16;
};
template <>
struct VectorOf<double> {
  using type = F64x1;
};

template <class V>
using MaskOf = decltype(V() < V());

// n <= V::kWidth elements: a whole vector, or the first lanes with the rest filled.
template <class V, class T>
inline V load_up_to(const T* p, int64_t n, typename V::Scalar fill) {
  return n >= V::kWidth ? load(p) : load_first(p, n, fill);
}
template <class V, class T>
inline void store_up_to(T* p, V x, int64_t n) {
  n >= V::kWidth ? store(p, x) : store_first(p, x, n);
}
template <class V>
inline MaskOf<V> load_mask_up_to(const bool* p, int64_t n) {
  if constexpr (V::kWidth == 1)
    return *p;
  else
    return n >= V::kWidth ? load_mask(p) : load_mask_first(p, n);
}
template <class V>
inline MaskOf<V> lanes_up_to(int64_t n) {
  if constexpr (V::kWidth == 1)
    return n > 0;
  else
    return first_lanes(static_cast<int>(n >= V::kWidth ? V::kWidth : n));
}

}  // namespace pyllmtune
