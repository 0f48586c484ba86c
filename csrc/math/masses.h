// masses: the probability of a token as an integer, so that sums have no order and every floor
// draws the same token.
//
//   y_i = (z_i - max z) * c,  c = log2(e) / T        two float32 operations
//   w_i = floor(2^y_i * 2^bits)                      at most 2^44; sums stay below 2^63
//
// 2^y is one polynomial of five fused multiply-adds, each correctly rounded, so w_i has the same
// bits wherever it is computed. Integers add up to the same sum in any order: the kept set and the
// token drawn cannot depend on threads, tiles, batch or machine. A mass is exact to 2^-44 of the
// largest and 1.5e-7 of its own size.
//
// Tokens are ordered by value, highest first, then by id; equal zeros of either sign are equal.
// Values are compared as integers (order_key), since a GPU may flush denormals in a comparison.
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric.h"

namespace pyllmtune {

constexpr float kMassLog2E = 1.44269504f;
constexpr float kMassRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
constexpr float kMassLowest = -64.0f;      // below it every mass is 0: 2^-64 * 2^44 < 1
// 2^-60: below it a row is greedy. y then has no bit that a flushed denormal could change.
constexpr float kGreedyBelow = 8.67361738e-19f;

PLT_HD float fused_of(float a, float b, float c) { return fmaf(a, b, c); }

// a - b, a * b and a / b without flushing denormals, which nvcc's -ftz would do.
PLT_HD float minus_of(float a, float b) {
#ifdef __CUDA_ARCH__
  float out;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a - b;
#endif
}
PLT_HD float times_of(float a, float b) {
#ifdef __CUDA_ARCH__
  float out;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a * b;
#endif
}

PLT_HD float divided_by(float a, float b) {
#ifdef __CUDA_ARCH__
  float out;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a / b;
#endif
}

// Bits of the largest mass: 44 up to V = 2^18, one fewer for each doubling beyond.
PLT_HD int mass_bits(int64_t vocab) {
  int log2_vocab = 0;
  while ((int64_t(1) << log2_vocab) < vocab) ++log2_vocab;
  return log2_vocab <= 18 ? 44 : 62 - log2_vocab;
}

PLT_HD bool is_greedy(float temperature) { return temperature < kGreedyBelow; }
PLT_HD float mass_rate(float temperature) { return divided_by(kMassLog2E, temperature); }

PLT_HD float mass_exponent(float z, float top, float rate) {
  return times_of(minus_of(z, top), rate);
}

// 2^f for f in [-1/2, 1/2]: minimax with 2^0 = 1, relative error 9.4e-8 before rounding.
template <class F>
PLT_HD F exp2_fraction(F f) {
  F p(0.0013269521f);
  p = fused_of(p, f, F(0.009671291f));
  p = fused_of(p, f, F(0.05550711f));
  p = fused_of(p, f, F(0.24022247f));
  p = fused_of(p, f, F(0.693147f));
  return fused_of(p, f, F(1.0f));
}

PLT_HD float pow2_of(int exponent) {  // exponent in [-126, 127]
  const uint32_t word = static_cast<uint32_t>(exponent + 127) << 23;
  float out;
  memcpy(&out, &word, sizeof out);
  return out;
}

// w of an exponent y <= 0.
PLT_HD int64_t mass_of(float y, int bits) {
  y = y > kMassLowest ? y : kMassLowest;
  const float whole = (y + kMassRound) - kMassRound;
  const float p = exp2_fraction(y - whole);
  return static_cast<int64_t>(p * pow2_of(static_cast<int>(whole) + bits));
}

// A float as an integer of the same order; -0 and +0 have one key. Its own inverse but for that.
PLT_HD int32_t order_key(float z) {
  int32_t word;
  memcpy(&word, &z, sizeof word);
  if (word == INT32_MIN) word = 0;
  return word ^ ((word >> 31) & 0x7fffffff);
}
PLT_HD float from_order_key(int32_t key) {
  const int32_t word = key ^ ((key >> 31) & 0x7fffffff);
  float z;
  memcpy(&z, &word, sizeof z);
  return z;
}

PLT_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// p in (0, 1) as a 64-bit fraction.
PLT_HD uint64_t fraction_of(double p) {
  return static_cast<uint64_t>(p * 9223372036854775808.0) << 1;
}

// The least integer that is p * total or more, at least 1: a token is kept while the mass before it
// is below this.
PLT_HD int64_t needed_mass(int64_t total, uint64_t fraction) {
  const uint64_t a = static_cast<uint64_t>(total);
  const uint64_t needed = multiply_high(a, fraction) + (a * fraction != 0);
  return static_cast<int64_t>(needed > 0 ? needed : 1);
}

// log2 of x in (0, 1], truncated after 30 binary places and rounded once: by squaring, so that it
// has the same bits everywhere (libraries differ in theirs). A token passes min-p x if its y is
// this or more.
PLT_HD float log2_exact(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  int64_t exponent = static_cast<int64_t>(word >> 23) - 127;
  uint64_t m = word & 0x7fffff;
  if (word < 0x800000) {  // denormal
    exponent = -126;
    while (m < 0x800000) m <<= 1, --exponent;
  }
  m = (m | 0x800000) << 40;  // [1, 2) with 63 binary places
  int64_t log2 = exponent;
  for (int i = 0; i < 30; ++i) {
    m = multiply_high(m, m);  // the square, halved
    const bool above_two = m >> 63;
    log2 = 2 * log2 + above_two;
    if (!above_two) m <<= 1;
  }
  return static_cast<float>(log2) * 9.31322575e-10f;  // 2^-30
}

}  // namespace pyllmtune
