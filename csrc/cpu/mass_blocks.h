// mass_blocks: loops over one row of logits in blocks of 256: maxima, integer masses, candidates.
//
// A row is read from memory once, for its block maxima; everything later comes from the cache, and
// skips the blocks whose maximum rules them out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../math/masses.h"
#include "memory.h"
#include "simd.h"

namespace pyllmtune {

constexpr int64_t kBlock = 256;  // 594 maxima for V = 151,936: enough to bound top-k closely
constexpr float kNone = -std::numeric_limits<float>::infinity();

// The last token that is kept; every filter keeps a prefix of the order (value descending, id
// ascending). The default keeps all that is allowed.
struct Cut {
  float z = kNone;
  int64_t id = -1;
  float least_y = kNone;  // and, for min-p, the least exponent that is kept
};

struct Scale {  // turns a logit into the exponent of its mass
  float top = 0.0f, rate = 1.0f;
  int bits = 44;
};

struct BlockScan {
  float max = kNone;
  int64_t allowed = 0;  // finite logits
  bool sound = true;    // neither NaN nor +inf
};

struct Candidate {
  float z;
  int32_t id;
  int64_t mass;
};

inline int lanes_of(int64_t n) { return static_cast<int>(std::clamp<int64_t>(n, 0, 16)); }

// f(vector, index) over z[0, n); the last vector is filled up with -inf.
template <class T, class Function>
inline void for_each_vector(const T* z, int64_t n, const Function& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(load(z + i), i);
  if (i < n) f(load_first(z + i, n - i, kNone), i);
}

template <class T>
BlockScan scan_block(const T* z, int64_t n) {
  F32x16 max(kNone), finite(0.0f), unsound(0.0f);
  const F32x16 infinite(std::numeric_limits<float>::infinity()), none(kNone), one(1.0f), zero(0.0f);
  for_each_vector(z, n, [&](F32x16 x, int64_t i) {
    prefetch(z + i + 8 * kBlock);
    max = max_of(x, max);
    const Mask16 below = x < infinite;  // false for NaN too
    finite = finite + select(below & (x > none), one, zero);
    unsound = unsound + select(below, zero, one);
  });
  return {reduce_max(max), static_cast<int64_t>(reduce_sum(finite)), reduce_sum(unsound) == 0.0f};
}

inline F32x16 exponents(F32x16 z, const Scale& scale) {
  return (z - F32x16(scale.top)) * F32x16(scale.rate);
}

// mass_of (csrc/math/masses.h), as a float before it is cut to an integer. Raises y to -64 at
// least.
inline F32x16 masses(F32x16& y, int bits) {
  y = max_of(y, F32x16(kMassLowest));
  const F32x16 shifted = y + F32x16(kMassRound);
  const F32x16 p = exp2_fraction(y - (shifted - F32x16(kMassRound)));
  return p * pow2_of_shifted(shifted + F32x16(static_cast<float>(bits)));
}

// Which of x, whose ids begin at `first` and whose exponents are y, the cut keeps.
inline Mask16 kept_lanes(F32x16 x, F32x16 y, int64_t first, const Cut& cut) {
  const Mask16 ties = first_lanes(lanes_of(cut.id - first + 1));
  const Mask16 kept = (x > F32x16(cut.z)) | ((x == F32x16(cut.z)) & ties);
  return kept & (y >= F32x16(cut.least_y));
}

struct Masses {
  int64_t mass = 0, count = 0;
  double weighted = 0;  // sum of mass * y
};

// Masses of the kept tokens among z[0, n), whose ids begin at `first`.
template <bool kCut, bool kWeighted, class T>
Masses block_masses(const T* z, int64_t n, int64_t first, const Scale& scale, const Cut& cut) {
  IntegerSum sum;
  F32x16 weighted(0.0f);
  int64_t count = 0;
  for_each_vector(z, n, [&](F32x16 x, int64_t i) {
    F32x16 y = exponents(x, scale);
    Mask16 kept;
    if constexpr (kCut) {
      kept = kept_lanes(x, y, first + i, cut);
      count += pyllmtune::count(kept);
    }
    F32x16 w = masses(y, scale.bits);
    if constexpr (kCut) w = select(kept, w, F32x16(0.0f));
    sum.add(w);
    if constexpr (kWeighted) weighted = fma_of(w, y, weighted);
  });
  return {sum.total(), count, kWeighted ? reduce_sum(weighted) : 0.0};
}

// Appends the chosen lanes of x, whose ids begin at `first`; their masses are left for later.
inline void append(Mask16 chosen, F32x16 x, int64_t first, std::vector<Candidate>& out) {
  uint32_t bits = bits_of(chosen);
  if (bits == 0) return;
  float lane[16];
  store(lane, x);
  for (; bits != 0; bits &= bits - 1) {
    const int k = __builtin_ctz(bits);
    out.push_back({lane[k], static_cast<int32_t>(first + k), 0});
  }
}

// Appends the kept tokens of z[0, n) to `out`, in order of id.
template <class T>
void gather_block(const T* z, int64_t n, int64_t first, const Scale& scale, const Cut& cut,
                  std::vector<Candidate>& out) {
  for_each_vector(z, n, [&](F32x16 x, int64_t i) {
    append(kept_lanes(x, exponents(x, scale), first + i, cut), x, first + i, out);
  });
}

// How many of z[0, n) are ahead of the token (value, id).
template <class T>
int64_t count_ahead(const T* z, int64_t n, int64_t first, float value, int64_t id) {
  int64_t ahead = 0;
  for_each_vector(z, n, [&](F32x16 x, int64_t i) {
    const Mask16 before = first_lanes(lanes_of(id - first - i));
    ahead += count((x > F32x16(value)) | ((x == F32x16(value)) & before));
  });
  return ahead;
}

}  // namespace pyllmtune
