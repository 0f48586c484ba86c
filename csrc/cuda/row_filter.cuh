// row_filter: where temperature, top-k, top-p and min-p end a row, without a sort.
//
//   Tokens are ordered by value, highest first, then by id. Every filter keeps a prefix of that
//   order, so what all of them keep is a Cut: the last kept token. Masses are integers
//   (csrc/math/masses.h), so no sum depends on threads and the cut is the same on every floor.
//
//   One block a row. Each warp reads a stretch of ids, the row once from memory and then from L2:
//     1. top, lowest and number of the allowed keys; each thread keeps its own top;
//     2. top-k: the k-th largest of the threads' tops is at most the k-th largest key, so the
//        tokens from there on are listed in shared memory and searched for the cut;
//     3. top-p: the mass of what it starts from; tokens too light to be needed are left out of the
//        list, and the list's own mass proves that nothing needed is missing;
//     4. min-p: the least key that passes, found without the row.
//   A search settles two bits of the cut's key a pass, from sums above three pivots. Where the
//   candidates overflow the list it goes over the row: at most 16 passes, 8 for bfloat16.
//   Limits: V <= 2^27.
#pragma once

#include <type_traits>

#include "key_row.cuh"

namespace pyllmtune {

constexpr int kFilterThreads = 512;
constexpr int kListed = 4096;  // keys in shared memory, 16 KiB: four blocks fit on an SM
constexpr int64_t kAllTies = INT64_MAX;

enum FilterOrder { kOrderHf, kOrderVllm, kOrderLlamaCpp, kOrderJoint };  // of the reference

// A scalar for all rows, or one value a row.
template <class V>
struct PerRow {
  V scalar;
  const V* rows;  // or null

  __device__ V operator[](int64_t row) const { return rows == nullptr ? scalar : rows[row]; }
};

// The filters of one row. Floats are compared by order_key: a comparison may flush denormals.
struct FilterRule {
  float temperature;
  int64_t top_k;
  double top_p;
  float min_p;
  int order;

  __device__ bool sound() const {
    const int32_t key = order_key(temperature);
    return key >= 0 && key < kInfKey && top_p == top_p && min_p == min_p;
  }
  __device__ bool has_min_p() const { return order_key(min_p) > 0; }
  __device__ bool has_top_p() const { return top_p < 1.0; }
  __device__ bool greedy() const { return is_greedy(temperature); }
};

struct FilterRules {
  PerRow<float> temperature;
  PerRow<int64_t> top_k;
  PerRow<double> top_p;
  PerRow<float> min_p;
  int order;

  __device__ FilterRule operator[](int64_t row) const {
    return {temperature[row], top_k[row], top_p[row], min_p[row], order};
  }
};

// Masses of a row at one temperature.
struct MassScale {
  float top, rate;
  int bits;

  __device__ static MassScale at(int32_t top_key, float temperature, int64_t vocab) {
    const float rate = is_greedy(temperature) ? kMassLog2E : mass_rate(temperature);
    return {from_order_key(top_key), rate, mass_bits(vocab)};
  }
  __device__ float exponent(int32_t key) const {
    return mass_exponent(from_order_key(key), top, rate);
  }
  __device__ int64_t mass(int32_t key) const { return mass_of(exponent(key), bits); }

  // The least key above -inf whose exponent is `least` or more; that of the top is.
  __device__ int32_t least_key(float least) const {
    int64_t low = kNoneKey, high = order_key(top);  // low fails, high passes
    while (high - low > 1) {
      const int64_t middle = (low + high) >> 1;
      const bool passes = order_key(exponent(static_cast<int32_t>(middle))) >= order_key(least);
      (passes ? high : low) = middle;
    }
    return static_cast<int32_t>(high);
  }
};

// A prefix of the order: every key above `key`, and the first `ties` ids that have it.
struct Prefix {
  int32_t key;
  int64_t ties;

  __device__ bool shorter_than(const Prefix& other) const {
    return key > other.key || (key == other.key && ties < other.ties);
  }
};
__device__ inline Prefix shorter(const Prefix& a, const Prefix& b) {
  return a.shorter_than(b) ? a : b;
}

// The last kept token.
struct Cut {
  int32_t key, id;

  __device__ bool keeps(int32_t other_key, int other_id) const {
    return other_key > key || (other_key == key && other_id <= id);
  }
};

struct Sums {  // above three pivots
  int64_t a, b, c;

  __device__ Sums operator+(const Sums& x) const { return {a + x.a, b + x.b, c + x.c}; }
};

// What a search sums: masses, or 1 for each token.
struct Weight {
  MassScale scale;
  bool count;

  __device__ int64_t operator()(int32_t key) const { return count ? 1 : scale.mass(key); }
};

// The keys that searches look at: those of the row from `floor` on, in `list` unless they overflow
// it.
template <class T>
struct Candidates {
  const KeyRow<T>& row;
  int32_t* list;
  int* size;  // shared
  int32_t floor = kNoneKey + 1;
  int listed = -1;  // or: the whole row

  __device__ void collect(int32_t from) {
    __syncthreads();  // the list and its size may still be read
    if (threadIdx.x == 0) *size = 0;
    __syncthreads();
    row.each([&](int32_t key, int) {
      if (key < from) return;
      const int place = atomicAdd(size, 1);  // any order: only sums are taken
      if (place < kListed) list[place] = key;
    });
    __syncthreads();
    const bool fits = *size <= kListed;
    listed = fits ? *size : -1;
    floor = fits ? from : kNoneKey + 1;
  }

  template <class F>
  __device__ void each(const F& f) const {
    if (listed < 0) row.each([&](int32_t key, int) { f(key); });
    for (int i = threadIdx.x; i < listed; i += blockDim.x) f(list[i]);
  }

  __device__ int64_t sum_from(int32_t key, const Weight& weight) const {
    int64_t sum = 0;
    const auto add = [&](int32_t other) {
      if (other >= key) sum += weight(other);
    };
    if (key >= floor)
      each(add);
    else
      row.each([&](int32_t other, int) { add(other); });
    return block_sum(sum);
  }

  // The shortest prefix of weight `need` or more; `all` is that of the keys from floor on, and
  // enough. The key is settled from its highest bit on, beginning below what floor and top share.
  __device__ Prefix search(int32_t top, int64_t all, int64_t need, const Weight& weight) const {
    // low bits that are the same in all keys of one sign: 16 of bfloat16, 13 of half, less one
    constexpr int kIdle = sizeof(T) == 4 ? 0 : std::is_same_v<T, __half> ? 12 : 16;
    const auto place = [](int32_t key) { return static_cast<uint32_t>(key) ^ 0x80000000u; };
    const uint32_t differs = (place(top) ^ place(floor)) | 1u << kIdle;
    int shift = (31 - __clz(static_cast<int>(differs))) & ~1;
    uint32_t pivot = shift == 30 ? 0 : place(top) >> (shift + 2) << (shift + 2);
    int64_t above = 0, through = all;  // weight above the pivot's group of keys, and with it
    for (; shift >= kIdle; shift -= 2) {
      Sums sums{};  // above pivot + 1, 2, 3 << shift
      each([&](int32_t key) {
        if (place(key) < pivot) return;
        const uint32_t digit = (place(key) - pivot) >> shift;
        const int64_t w = digit > 0 ? weight(key) : 0;
        sums.a += w;
        sums.b += digit > 1 ? w : 0;
        sums.c += digit > 2 ? w : 0;
      });
      sums = block_sum(sums);
      const int step = (sums.a >= need) + (sums.b >= need) + (sums.c >= need);
      pivot += static_cast<uint32_t>(step) << shift;
      above = step == 3 ? above : step == 2 ? sums.c : step == 1 ? sums.b : sums.a;
      through = step == 3 ? sums.c : step == 2 ? sums.b : step == 1 ? sums.a : through;
    }
    // they are ones where the number is negative
    if (pivot >> 31 == 0) pivot |= (1u << kIdle) - 1;
    const int32_t key = static_cast<int32_t>(place(static_cast<int32_t>(pivot)));
    const int64_t one = weight(key), ties = (need - above + one - 1) / one;
    return {key, ties * one < through - above ? ties : kAllTies};
  }
};

template <class T>
__device__ Prefix find_top_k(Candidates<T>& candidates, int64_t top_k, const RowSummary& seen,
                             int32_t own_top) {
  const Weight count{{}, true};
  if (top_k <= blockDim.x) {
    candidates.list[threadIdx.x] = own_top;
    __syncthreads();
    const int threads = blockDim.x;
    const Candidates<T> tops{candidates.row, candidates.list, candidates.size, kNoneKey, threads};
    candidates.collect(max(tops.search(seen.top, threads, top_k, count).key, kNoneKey + 1));
  }
  const int64_t all = candidates.listed < 0 ? seen.allowed : candidates.listed;
  return candidates.search(seen.top, all, top_k, count);
}

// `base`: the prefix of whose mass the share is taken.
template <class T>
__device__ Prefix find_top_p(Candidates<T>& candidates, double top_p, const Prefix& base,
                             int32_t top, const MassScale& scale) {
  const Weight mass{scale, false};
  const int64_t total = base.ties == kAllTies ? candidates.sum_from(base.key, mass)
                                              : candidates.sum_from(base.key + 1, mass) +
                                                    base.ties * scale.mass(base.key);
  const int64_t need = needed_mass(total, fraction_of(top_p > 0.0 ? top_p : 0.0));
  int64_t all = candidates.listed < 0 ? 0 : candidates.sum_from(candidates.floor, mass);
  if (all < need) {
    // tokens lighter than this hold less than total - need together, so none of them is needed;
    // that holds up to rounding, so the sum of the others is checked
    const float lightest = static_cast<float>((total - need) / candidates.row.vocab + 1);
    candidates.collect(scale.least_key(log2f(lightest) - scale.bits - 0.01f));
    all = candidates.sum_from(candidates.floor, mass);
  }
  if (all < need) {
    candidates.listed = -1, candidates.floor = kNoneKey + 1;
    all = candidates.sum_from(candidates.floor, mass);
  }
  return candidates.search(top, all, need, mass);
}

template <class T>
__device__ Prefix find_prefix(const KeyRow<T>& row, const FilterRule& rule, const RowSummary& seen,
                              int32_t own_top) {
  PLT_SHARED(int32_t, list, kListed);
  PLT_SHARED(int, size, 1);
  if (rule.greedy()) return {seen.top, 1};
  const Prefix everything{kNoneKey + 1, kAllTies};
  const float temperature = rule.order == kOrderLlamaCpp ? 1.0f : rule.temperature;
  const MassScale scale = MassScale::at(seen.top, temperature, row.vocab);
  Candidates<T> candidates{row, list, size};
  Prefix k = everything, m = everything, p = everything;
  if (rule.has_min_p()) {
    const float min_p = from_order_key(min(order_key(rule.min_p), order_key(1.0f)));
    m.key = scale.least_key(log2_exact(min_p));
  }
  if (rule.top_k > 0 && rule.top_k < seen.allowed)
    k = find_top_k(candidates, rule.top_k, seen, own_top);
  if (rule.has_top_p()) {
    const Prefix base = rule.order == kOrderJoint  ? everything
                        : rule.order == kOrderVllm ? shorter(k, m)
                                                   : k;
    p = find_top_p(candidates, rule.top_p, base, seen.top, scale);
  }
  return shorter(shorter(k, m), p);
}

// The last token of a prefix.
template <class T>
__device__ Cut cut_of(const KeyRow<T>& row, const Prefix& kept) {
  PLT_SHARED(int64_t, of_warps, kWarp);
  if (kept.ties == kAllTies) return {kept.key, INT32_MAX};
  const auto same = [&](int32_t key, int) -> int64_t { return key == kept.key; };
  sum_stretches(row, same, of_warps);
  const int id = threadIdx.x < kWarp ? walk(row, same, of_warps, kept.ties - 1) : 0;
  return {kept.key, block_broadcast(id)};
}

// The cut of a row without NaN or +inf, with something allowed and sound parameters. When a thread
// returns, the whole block has read the row for the last time: it may be overwritten.
template <class T>
__device__ Cut find_cut(const KeyRow<T>& row, const FilterRule& rule, const RowSummary& seen,
                        int32_t own_top) {
  return cut_of(row, find_prefix(row, rule, seen, own_top));
}

}  // namespace pyllmtune
