// simd_generic: sixteen floats in an array, for any CPU; the compiler vectorises the loops as far
// as it can (SSE2, NEON). Without a fused multiply-add, so results may differ from AVX2 and AVX-512
// in the last bits. Included by simd.h alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace pyllmtune {

#define PLT_LANES for (int i = 0; i < 16; ++i)

struct Mask16 {
  bool lane[16];
};
inline Mask16 operator&(Mask16 a, Mask16 b) {
  PLT_LANES a.lane[i] = a.lane[i] & b.lane[i];
  return a;
}
inline Mask16 operator|(Mask16 a, Mask16 b) {
  PLT_LANES a.lane[i] = a.lane[i] | b.lane[i];
  return a;
}
inline Mask16 operator!(Mask16 a) {
  PLT_LANES a.lane[i] = !a.lane[i];
  return a;
}
inline int count(Mask16 a) {
  int n = 0;
  PLT_LANES n += a.lane[i];
  return n;
}
inline uint32_t bits_of(Mask16 a) {
  uint32_t bits = 0;
  PLT_LANES bits |= static_cast<uint32_t>(a.lane[i]) << i;
  return bits;
}
inline Mask16 mask_of_bits(uint32_t bits) {
  Mask16 m;
  PLT_LANES m.lane[i] = (bits >> i) & 1;
  return m;
}
inline Mask16 load_mask(const bool* p) {
  Mask16 m;
  PLT_LANES m.lane[i] = p[i];
  return m;
}
inline Mask16 first_lanes(int n) {
  Mask16 m;
  PLT_LANES m.lane[i] = i < n;
  return m;
}

struct F32x16 {
  using Scalar = float;
  static constexpr int kWidth = 16;
  float lane[16];

  F32x16() = default;
  explicit F32x16(float value) { PLT_LANES lane[i] = value; }
};

template <class Function>
inline F32x16 per_lane(F32x16 a, F32x16 b, Function f) {
  PLT_LANES a.lane[i] = f(a.lane[i], b.lane[i]);
  return a;
}
template <class Function>
inline Mask16 compare(F32x16 a, F32x16 b, Function f) {
  Mask16 m;
  PLT_LANES m.lane[i] = f(a.lane[i], b.lane[i]);
  return m;
}
inline F32x16 operator+(F32x16 a, F32x16 b) {
  return per_lane(a, b, [](float x, float y) { return x + y; });
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return per_lane(a, b, [](float x, float y) { return x - y; });
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return per_lane(a, b, [](float x, float y) { return x * y; });
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return per_lane(a, b, [](float x, float y) { return x / y; });
}
inline F32x16 fma_of(F32x16 a, F32x16 b, F32x16 c) { return a * b + c; }
inline F32x16 max_of(F32x16 a, F32x16 b) {
  return per_lane(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline F32x16 min_of(F32x16 a, F32x16 b) {
  return per_lane(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline Mask16 operator<(F32x16 a, F32x16 b) {
  return compare(a, b, [](float x, float y) { return x < y; });
}
inline Mask16 operator>(F32x16 a, F32x16 b) {
  return compare(a, b, [](float x, float y) { return x > y; });
}
inline Mask16 operator>=(F32x16 a, F32x16 b) {
  return compare(a, b, [](float x, float y) { return x >= y; });
}
inline Mask16 operator==(F32x16 a, F32x16 b) {
  return compare(a, b, [](float x, float y) { return x == y; });
}
inline F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
  PLT_LANES no.lane[i] = m.lane[i] ? yes.lane[i] : no.lane[i];
  return no;
}

inline F32x16 pow2_of_shifted(F32x16 x) {
  PLT_LANES {
    uint32_t bits;
    memcpy(&bits, &x.lane[i], sizeof bits);
    bits = (bits + 127u) << 23;
    memcpy(&x.lane[i], &bits, sizeof bits);
  }
  return x;
}

inline float widen(float x) { return x; }
inline float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(Fp16 x) {
  _Float16 half;
  memcpy(&half, &x.bits, sizeof half);
  return static_cast<float>(half);
}
inline void narrow(float* p, float x) { *p = x; }
inline void narrow(Bf16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(Fp16* p, float x) {
  const _Float16 half = static_cast<_Float16>(x);
  memcpy(&p->bits, &half, sizeof half);
}
template <class T>
inline F32x16 load(const T* p) {
  F32x16 x;
  PLT_LANES x.lane[i] = widen(p[i]);
  return x;
}
template <class T>
inline void store(T* p, F32x16 x) {
  PLT_LANES narrow(p + i, x.lane[i]);
}

template <class T>
inline void stream(T* p, F32x16 x) {
  store(p, x);
}
inline void end_streams() {}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline F32x16 exponent_of(F32x16 x) {
  PLT_LANES x.lane[i] =
      static_cast<float>(static_cast<int32_t>(bits_of(x.lane[i]) >> 23 & 0x1ff) - 127);
  return x;
}
inline F32x16 mantissa_of(F32x16 x) {
  PLT_LANES {
    const uint32_t bits = (bits_of(x.lane[i]) & 0x007fffff) | 0x3f800000;
    memcpy(&x.lane[i], &bits, sizeof bits);
  }
  return x;
}

inline float reduce_sum(F32x16 x) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
  return x.lane[0];
}
inline float reduce_max(F32x16 x) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      x.lane[i] = x.lane[i] > x.lane[i + half] ? x.lane[i] : x.lane[i + half];
  return x.lane[0];
}
// one rounding on every instruction set, unlike fma_of
inline F32x16 fused_of(F32x16 a, F32x16 b, F32x16 c) {
  PLT_LANES a.lane[i] = fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return a;
}

// Lane i of x[k] to lane k of x[i].
inline void transpose(F32x16 (&x)[16]) {
  float lane[16][16];
  for (int i = 0; i < 16; ++i) store(lane[i], x[i]);
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < i; ++k) std::swap(lane[i][k], lane[k][i]);
  for (int i = 0; i < 16; ++i) x[i] = load(lane[i]);
}

// Vectors are arrays: inlining whole kernels costs the compiler minutes and gains nothing.
constexpr bool kSpecialize = false;
#define PLT_FLATTEN

// The part of a product of matrices held in registers.
constexpr int kMatmulRows = 3, kMatmulVectors = 1;
#define PLT_PAIR_TARGET
inline bool multiplies_pairs() { return false; }
inline F32x16 add_pair_products(F32x16 sum, uint32_t, const uint32_t*) { return sum; }

// Sum of floats below 2^63, 0 or more, each cut to an integer.
struct IntegerSum {
  int64_t lane[16] = {};

  void add(F32x16 x) { PLT_LANES lane[i] += static_cast<int64_t>(x.lane[i]); }
  int64_t total() const {
    int64_t sum = 0;
    PLT_LANES sum += lane[i];
    return sum;
  }
};
#undef PLT_LANES

}  // namespace pyllmtune
