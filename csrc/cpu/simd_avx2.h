// simd_avx2: sixteen floats in two registers, lane for lane what simd_avx512.h computes. Included
// by simd.h alone.
#pragma once

#include <immintrin.h>

#include <utility>

namespace pyllmtune {

struct Mask16 {
  __m256 a, b;
};
inline Mask16 operator&(Mask16 x, Mask16 y) {
  return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)};
}
inline Mask16 operator|(Mask16 x, Mask16 y) {
  return {_mm256_or_ps(x.a, y.a), _mm256_or_ps(x.b, y.b)};
}
inline Mask16 operator!(Mask16 x) {
  const __m256 ones = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {_mm256_xor_ps(x.a, ones), _mm256_xor_ps(x.b, ones)};
}
inline int count(Mask16 x) {
  return __builtin_popcount(_mm256_movemask_ps(x.a)) + __builtin_popcount(_mm256_movemask_ps(x.b));
}
inline uint32_t bits_of(Mask16 x) {
  return static_cast<uint32_t>(_mm256_movemask_ps(x.a) | _mm256_movemask_ps(x.b) << 8);
}
inline Mask16 mask_of_bits(uint32_t bits) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, high), high))};
}
inline Mask16 load_mask(const bool* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i zero = _mm256_setzero_si256();
  return {
      _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(raw), zero)),
      _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(raw, 8)), zero))};
}
inline Mask16 first_lanes(int n) {
  const __m256i limit = _mm256_set1_epi32(n), lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i upper = _mm256_add_epi32(lane, _mm256_set1_epi32(8));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, lane)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, upper))};
}

struct F32x16 {
  using Scalar = float;
  static constexpr int kWidth = 16;
  __m256 a, b;

  F32x16() = default;
  F32x16(__m256 low, __m256 high) : a(low), b(high) {}
  explicit F32x16(float value) : a(_mm256_set1_ps(value)), b(a) {}
};

inline F32x16 operator+(F32x16 x, F32x16 y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline F32x16 operator-(F32x16 x, F32x16 y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
inline F32x16 operator*(F32x16 x, F32x16 y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline F32x16 operator/(F32x16 x, F32x16 y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
inline F32x16 fma_of(F32x16 x, F32x16 y, F32x16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline F32x16 max_of(F32x16 x, F32x16 y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
inline F32x16 min_of(F32x16 x, F32x16 y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}

template <int kPredicate>
inline Mask16 compare(F32x16 x, F32x16 y) {
  return {_mm256_cmp_ps(x.a, y.a, kPredicate), _mm256_cmp_ps(x.b, y.b, kPredicate)};
}
inline Mask16 operator<(F32x16 x, F32x16 y) { return compare<_CMP_LT_OQ>(x, y); }
inline Mask16 operator>(F32x16 x, F32x16 y) { return compare<_CMP_GT_OQ>(x, y); }
inline Mask16 operator>=(F32x16 x, F32x16 y) { return compare<_CMP_GE_OQ>(x, y); }
inline Mask16 operator==(F32x16 x, F32x16 y) { return compare<_CMP_EQ_OQ>(x, y); }
inline F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}

inline __m256 pow2_of_shifted(__m256 x) {
  const __m256i exponent = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline F32x16 pow2_of_shifted(F32x16 x) { return {pow2_of_shifted(x.a), pow2_of_shifted(x.b)}; }

inline __m256 widen(const Bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline __m256 widen(const Fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F32x16 load(const Bf16* p) { return {widen(p), widen(p + 8)}; }
inline F32x16 load(const Fp16* p) { return {widen(p), widen(p + 8)}; }

inline void narrow(Bf16* p, __m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256 kept =
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void narrow(Fp16* p, __m256 x) {
  const __m128i raw = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), raw);
}
inline void store(float* p, F32x16 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline void store(Bf16* p, F32x16 x) { narrow(p, x.a), narrow(p + 8, x.b); }
inline void store(Fp16* p, F32x16 x) { narrow(p, x.a), narrow(p + 8, x.b); }

inline void stream(float* p, F32x16 x) { _mm256_stream_ps(p, x.a), _mm256_stream_ps(p + 8, x.b); }
template <class T>
inline void stream(T* p, F32x16 x) {
  store(p, x);
}
inline void end_streams() { _mm_sfence(); }

inline __m256 exponent_of(__m256 x) {
  const __m256i e = _mm256_srli_epi32(_mm256_castps_si256(x), 23);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(e, _mm256_set1_epi32(127)));
}
inline __m256 mantissa_of(__m256 x) {
  const __m256i m = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x007fffff));
  return _mm256_castsi256_ps(_mm256_or_si256(m, _mm256_set1_epi32(0x3f800000)));
}
inline F32x16 exponent_of(F32x16 x) { return {exponent_of(x.a), exponent_of(x.b)}; }
inline F32x16 mantissa_of(F32x16 x) { return {mantissa_of(x.a), mantissa_of(x.b)}; }

inline float reduce_sum(F32x16 x) {
  const __m256 a = _mm256_add_ps(x.a, x.b);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
inline float reduce_max(F32x16 x) {
  const __m256 a = _mm256_max_ps(x.a, x.b);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

// one rounding on every instruction set, unlike fma_of
inline F32x16 fused_of(F32x16 a, F32x16 b, F32x16 c) { return fma_of(a, b, c); }

// Lane i of x[k] to lane k of x[i].
inline void transpose(F32x16 (&x)[16]) {
  float lane[16][16];
  for (int i = 0; i < 16; ++i) store(lane[i], x[i]);
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < i; ++k) std::swap(lane[i][k], lane[k][i]);
  for (int i = 0; i < 16; ++i) x[i] = load(lane[i]);
}

// Vectors are registers: a loop over them pays when all of it is inlined and its choices are known.
constexpr bool kSpecialize = true;
#define PLT_FLATTEN __attribute__((flatten))

// The part of a product of matrices held in registers: 12 of 16 registers.
constexpr int kMatmulRows = 6, kMatmulVectors = 1;
#define PLT_PAIR_TARGET
inline bool multiplies_pairs() { return false; }
inline F32x16 add_pair_products(F32x16 sum, uint32_t, const uint32_t*) { return sum; }

// Sum of floats below 2^63, 0 or more, each cut to an integer: the 24-bit mantissa, shifted by the
// exponent. A shift count below 0 is huge as an unsigned number, and such a shift gives 0.
struct IntegerSum {
  __m256i sum = _mm256_setzero_si256();

  void add_four(__m128i mantissa, __m128i left) {
    const __m256i m = _mm256_cvtepu32_epi64(mantissa), up = _mm256_cvtepi32_epi64(left);
    const __m256i down = _mm256_sub_epi64(_mm256_setzero_si256(), up);
    sum = _mm256_add_epi64(sum,
                           _mm256_or_si256(_mm256_sllv_epi64(m, up), _mm256_srlv_epi64(m, down)));
  }
  void add_eight(__m256 x) {
    const __m256i word = _mm256_castps_si256(x);
    const __m256i fraction = _mm256_and_si256(word, _mm256_set1_epi32(0x7fffff));
    const __m256i mantissa = _mm256_or_si256(fraction, _mm256_set1_epi32(0x800000));
    const __m256i left = _mm256_sub_epi32(_mm256_srli_epi32(word, 23), _mm256_set1_epi32(150));
    add_four(_mm256_castsi256_si128(mantissa), _mm256_castsi256_si128(left));
    add_four(_mm256_extracti128_si256(mantissa, 1), _mm256_extracti128_si256(left, 1));
  }
  void add(F32x16 x) { add_eight(x.a), add_eight(x.b); }
  int64_t total() const {
    int64_t lane[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane), sum);
    return lane[0] + lane[1] + lane[2] + lane[3];
  }
};

}  // namespace pyllmtune
