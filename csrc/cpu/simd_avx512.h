// simd_avx512: sixteen floats in one register. Included by simd.h alone.
#pragma once

#include <immintrin.h>

namespace pyllmtune {

struct Mask16 {
  __mmask16 bits;
};
inline Mask16 operator&(Mask16 a, Mask16 b) { return {static_cast<__mmask16>(a.bits & b.bits)}; }
inline Mask16 operator|(Mask16 a, Mask16 b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
inline Mask16 operator!(Mask16 a) { return {static_cast<__mmask16>(~a.bits)}; }
inline int count(Mask16 a) { return __builtin_popcount(a.bits); }
inline uint32_t bits_of(Mask16 a) { return a.bits; }
inline Mask16 mask_of_bits(uint32_t bits) { return {static_cast<__mmask16>(bits)}; }
inline Mask16 load_mask(const bool* p) {
  const __m512i lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_test_epi32_mask(lanes, lanes)};
}
inline Mask16 first_lanes(int n) { return {static_cast<__mmask16>((1u << n) - 1)}; }

struct F32x16 {
  using Scalar = float;
  static constexpr int kWidth = 16;
  __m512 v;

  F32x16() = default;
  F32x16(__m512 value) : v(value) {}
  explicit F32x16(float value) : v(_mm512_set1_ps(value)) {}
};

inline F32x16 operator+(F32x16 a, F32x16 b) { return _mm512_add_ps(a.v, b.v); }
inline F32x16 operator-(F32x16 a, F32x16 b) { return _mm512_sub_ps(a.v, b.v); }
inline F32x16 operator*(F32x16 a, F32x16 b) { return _mm512_mul_ps(a.v, b.v); }
inline F32x16 fma_of(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline F32x16 operator/(F32x16 a, F32x16 b) { return _mm512_div_ps(a.v, b.v); }
inline F32x16 max_of(F32x16 a, F32x16 b) { return _mm512_max_ps(a.v, b.v); }
inline F32x16 min_of(F32x16 a, F32x16 b) { return _mm512_min_ps(a.v, b.v); }
inline Mask16 operator<(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask16 operator>(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask16 operator>=(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline Mask16 operator==(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
  return _mm512_mask_blend_ps(m.bits, no.v, yes.v);
}

// 2^k of the integer k that sits in the low bits of x = k + 1.5 * 2^23; k in [-127, 128], 2^-127 is
// 0, 2^128 is inf.
inline F32x16 pow2_of_shifted(F32x16 x) {
  const __m512i exponent = _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

inline F32x16 times_pow2(F32x16 p, F32x16 n) { return _mm512_scalef_ps(p.v, n.v); }

inline F32x16 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32x16 load(const Bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline F32x16 load(const Fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void store(float* p, F32x16 x) { _mm512_storeu_ps(p, x.v); }
inline void store(Bf16* p, F32x16 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i high =
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
inline void store(Fp16* p, F32x16 x) {
  const __m256i raw = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), raw);
}

// Past the cache, without reading the line first; p on a boundary of the vector's size.
inline void stream(float* p, F32x16 x) { _mm512_stream_ps(p, x.v); }
template <class T>
inline void stream(T* p, F32x16 x) {  // two bytes an element
  store(p, x);
}
inline void end_streams() { _mm_sfence(); }

// x > 0 as m * 2^e, m in [1, 2); a subnormal x gives something finite.
inline F32x16 exponent_of(F32x16 x) {
  const __m512i e = _mm512_srli_epi32(_mm512_castps_si512(x.v), 23);
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(e, _mm512_set1_epi32(127)));
}
inline F32x16 mantissa_of(F32x16 x) {
  const __m512i m = _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x007fffff));
  return _mm512_castsi512_ps(_mm512_or_si512(m, _mm512_set1_epi32(0x3f800000)));
}

// lanes i and i + 8 first, then i and i + 4, ...: the order that every instruction set follows
inline float reduce_sum(F32x16 x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
inline float reduce_max(F32x16 x) { return _mm512_reduce_max_ps(x.v); }

// one rounding on every instruction set, unlike fma_of
inline F32x16 fused_of(F32x16 a, F32x16 b, F32x16 c) { return fma_of(a, b, c); }

// Lane i of x[k] to lane k of x[i].
inline void transpose(F32x16 (&x)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4)  // fours: b[i + j] has columns j, 4 + j, 8 + j, 12 + j
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + 2 + j]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int j = 0; j < 4; ++j) {
    const __m512 low02 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    const __m512 low13 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 high02 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 high13 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    x[j].v = _mm512_shuffle_f32x4(low02, high02, 0x88);
    x[4 + j].v = _mm512_shuffle_f32x4(low13, high13, 0x88);
    x[8 + j].v = _mm512_shuffle_f32x4(low02, high02, 0xdd);
    x[12 + j].v = _mm512_shuffle_f32x4(low13, high13, 0xdd);
  }
}

// Vectors are registers: a loop over them pays when all of it is inlined and its choices are known.
constexpr bool kSpecialize = true;
#define PLT_FLATTEN __attribute__((flatten))

// The part of a product of matrices held in registers: 24 of 32 registers.
constexpr int kMatmulRows = 12, kMatmulVectors = 2;

// sum + the products of a pair of bfloat16 with sixteen pairs. Callers are compiled for it, and ask
// multiplies_pairs() before.
#define PLT_PAIR_TARGET __attribute__((target("avx512bf16")))
inline bool multiplies_pairs() { return __builtin_cpu_supports("avx512bf16"); }
PLT_PAIR_TARGET inline F32x16 add_pair_products(F32x16 sum, uint32_t a, const uint32_t* b) {
  return _mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                          (__m512bh)_mm512_loadu_si512(b));
}

// Sum of floats below 2^63, 0 or more, each cut to an integer.
struct IntegerSum {
  __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();

  void add(F32x16 x) {
    const __m256 upper = _mm512_extractf32x8_ps(x.v, 1);
    low = _mm512_add_epi64(low, _mm512_cvttps_epi64(_mm512_castps512_ps256(x.v)));
    high = _mm512_add_epi64(high, _mm512_cvttps_epi64(upper));
  }
  int64_t total() const { return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high)); }
};

}  // namespace pyllmtune
