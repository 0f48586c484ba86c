// numeric: the few scalar functions that the shared formulas need, under one name on host and
// device.
//
// Formulas in this folder are templates over a number F. On a GPU F is float; on the CPU it is
// double, or sixteen floats at a time (csrc/cpu/simd.h adds the same names for its vectors). So
// they are written without branches: select() instead of if, and comparisons combined with & and |.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define PLT_HD __host__ __device__ __forceinline__
#else
#define PLT_HD inline
#endif

namespace pyllmtune {

PLT_HD float select(bool condition, float yes, float no) { return condition ? yes : no; }
PLT_HD double select(bool condition, double yes, double no) { return condition ? yes : no; }

// a > b ? a : b (a < b ? a : b), so that a NaN in `a` is dropped and a NaN in `b` is kept, as x86
// vectors do it.
PLT_HD float max_of(float a, float b) { return a > b ? a : b; }
PLT_HD double max_of(double a, double b) { return a > b ? a : b; }
PLT_HD float min_of(float a, float b) { return a < b ? a : b; }
PLT_HD double min_of(double a, double b) { return a < b ? a : b; }

// a b + c, with one rounding or two
PLT_HD float fma_of(float a, float b, float c) { return a * b + c; }
PLT_HD double fma_of(double a, double b, double c) { return a * b + c; }

PLT_HD float exp_of(float x) { return expf(x); }
PLT_HD double exp_of(double x) { return exp(x); }
PLT_HD float log_of(float x) { return logf(x); }
PLT_HD double log_of(double x) { return log(x); }

PLT_HD bool is_finite(float x) { return x - x == 0.0f; }
PLT_HD bool is_finite(double x) { return x - x == 0.0; }

// e^x - 1 - x for |x| < 1/2: the series to x^9/9! is exact to 2e-9 relative. The plain expression
// loses every digit near 0, where most tokens of an almost on-policy batch are.
template <class F>
PLT_HD F small_exp_residual(F x) {
  F series(1.0f / 362880);
  series = fma_of(series, x, F(1.0f / 40320));
  series = fma_of(series, x, F(1.0f / 5040));
  series = fma_of(series, x, F(1.0f / 720));
  series = fma_of(series, x, F(1.0f / 120));
  series = fma_of(series, x, F(1.0f / 24));
  series = fma_of(series, x, F(1.0f / 6));
  series = fma_of(series, x, F(0.5f));
  return series * x * x;
}
template <>
PLT_HD double small_exp_residual<double>(double x) {
  return expm1(x) - x;
}

// e^x - 1 - x, given x and e^x.
template <class F>
PLT_HD F exp_residual(F x, F exp_x) {
  const auto small = (x < F(0.5f)) & (x > F(-0.5f));
  return select(small, small_exp_residual(x), exp_x - F(1.0f) - x);
}

// Both from one exponential; a vector may have a cheaper way.
template <class F>
struct ExpPair {
  F value, residual;  // e^x, e^x - 1 - x
};
template <class F>
PLT_HD ExpPair<F> exp_pair(F x) {
  const F value = exp_of(x);
  return {value, exp_residual(x, value)};
}

// x - log(1 + x) for |x| < 1/7: the series to x^10, 3e-8 relative.
template <class F>
PLT_HD F small_log_residual(F x) {
  F series(1.0f / 10);
  series = fma_of(series, x, F(-1.0f / 9));
  series = fma_of(series, x, F(1.0f / 8));
  series = fma_of(series, x, F(-1.0f / 7));
  series = fma_of(series, x, F(1.0f / 6));
  series = fma_of(series, x, F(-1.0f / 5));
  series = fma_of(series, x, F(1.0f / 4));
  series = fma_of(series, x, F(-1.0f / 3));
  series = fma_of(series, x, F(0.5f));
  return series * x * x;
}
template <>
PLT_HD double small_log_residual<double>(double x) {
  return x - log1p(x);
}

// The same for any x > -1; the plain expression has an error of 1e-5 and less.
template <class F>
PLT_HD F log_residual(F x) {
  const auto small = (x < F(0.125f)) & (x > F(-0.125f));
  return select(small, small_log_residual(x), x - log_of(F(1.0f) + x));
}

}  // namespace pyllmtune
