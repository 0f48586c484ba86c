// sample: draws tokens from the filtered softmax of a row, by inverting the cumulative integer
// masses of its kept tokens, in order of id, at one 64-bit Philox number a draw.
//
//   logits [outer, inner, V] -> tokens [R, S]: S draws from each of R rows, all or row_indices [R]
//   token = first id with  sum of kept masses up to it > floor(u * kept mass / 2^64)
//
//   sample_kernel: one block a row finds the cut (row_filter.cuh), sums the kept masses of each
//   warp's stretch of ids, and gives the draws to the warps; a warp walks the stretch in which its
//   target falls. V read from memory a row are the floor; the other reads come from L2. The token
//   follows from the row, its parameters, seed, position and the number of the draw alone.
//   kept_offsets_kernel and kept_ids_kernel: the ids of the kept tokens, row after row.
//   Limits: V <= 2^27, fewer than 2^31 rows.
#pragma once

#include "../math/philox.h"
#include "row_filter.cuh"

namespace pyllmtune {

constexpr int kOffsetThreads = 512;
constexpr float kLn2 = 0.693147181f;

template <class T>
struct SampleInput {
  const T* logits;
  RowLayout layout;
  int64_t logits_rows;
  int vocab;
  AllowedTokens allowed;
  const int64_t* row_indices;  // or null
  FilterRules rules;
  PerRow<int64_t> seed, position;
  int samples;

  __device__ int64_t source(int64_t row) const {
    return row_indices == nullptr ? row : row_indices[row];
  }
  __device__ bool has(int64_t source) const { return source >= 0 && source < logits_rows; }
  __device__ KeyRow<T> row(int64_t row) const {
    return allowed.of(logits + layout.offset(static_cast<uint32_t>(source(row))), row, vocab);
  }
};

struct SampleResults {
  int64_t rows;
  int samples;
  int64_t* tokens;    // [rows, samples]
  bool* valid;        // [rows]
  float* logprobs;    // [3, rows, samples], or null
  int64_t* rank;      // [rows, samples], or null like all statistics
  int64_t* num_kept;  // [rows]
  float *kept_mass, *entropy;
  int32_t* cuts;  // [rows, 2] key and id, or null

  __device__ void write_logprobs(int64_t draw, float raw, float scaled, float processed) const {
    if (logprobs == nullptr) return;
    const int64_t plane = rows * samples;
    logprobs[draw] = fminf(raw, 0.0f);
    logprobs[plane + draw] = fminf(scaled, 0.0f);
    logprobs[2 * plane + draw] = fminf(processed, 0.0f);
  }
  __device__ void write_row(int64_t row, bool is_valid, int64_t number, float mass, float h,
                            const Cut& cut) const {
    valid[row] = is_valid;
    num_kept[row] = number;
    if (rank != nullptr) kept_mass[row] = mass, entropy[row] = h;
    if (cuts != nullptr) cuts[2 * row] = cut.key, cuts[2 * row + 1] = cut.id;
  }
  // By all threads.
  __device__ void write_invalid(int64_t row) const {
    if (threadIdx.x == 0) write_row(row, false, 0, NAN, NAN, {INT32_MAX, -1});
    for (int s = threadIdx.x; s < samples; s += blockDim.x) {
      const int64_t draw = row * samples + s;
      tokens[draw] = -1;
      if (rank != nullptr) rank[draw] = 0;
      for (int kind = 0; logprobs != nullptr && kind < 3; ++kind)
        logprobs[kind * rows * samples + draw] = NAN;
    }
  }
};

// Sums over a row: mass of the kept; mass of all at T and at 1; kept mass * exponent; number kept.
struct Tally {
  int64_t kept, total, plain;
  double weighted;
  int number;

  __device__ Tally operator+(const Tally& x) const {
    return {kept + x.kept, total + x.total, plain + x.plain, weighted + x.weighted,
            number + x.number};
  }
};

// A row that can be drawn from. In a greedy row the one kept token has mass 1.
template <class T>
struct DrawRow {
  const KeyRow<T>& row;
  Cut cut;
  MassScale scale;
  bool greedy;

  __device__ int64_t operator()(int32_t key, int id) const {  // its kept mass
    if (!cut.keeps(key, id)) return 0;
    return greedy ? 1 : scale.mass(key);
  }

  // Also of_warps[w], the kept mass in the stretch of warp w.
  __device__ Tally tally(bool totals, int64_t* of_warps) const {
    const MassScale plain{scale.top, kMassLog2E, scale.bits};
    Tally mine{};
    row.each([&](int32_t key, int id) {
      const int64_t w = (*this)(key, id);
      mine.number += cut.keeps(key, id);
      mine.kept += w;
      if (!totals) return;
      mine.total += scale.mass(key);
      mine.plain += plain.mass(key);
      if (w > 0) mine.weighted += static_cast<double>(w) * scale.exponent(key);
    });
    const int64_t own = warp_join(mine.kept, [](int64_t a, int64_t b) { return a + b; });
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = own;
    return block_sum(mine);  // with barriers
  }

  // log of a sum of masses, relative to the largest
  __device__ float log_mass(int64_t mass) const {
    return logf(static_cast<float>(mass) * pow2_of(-scale.bits));
  }

  // 1 + number of tokens ahead; by all threads.
  __device__ int64_t rank(int token) const {
    const Cut last{row.key_at(token), token};
    int64_t ahead = 0;
    row.each([&](int32_t key, int id) { ahead += last.keeps(key, id); });
    return block_sum(ahead);  // the token itself is counted
  }
};

template <class T>
__global__ void __launch_bounds__(kFilterThreads, 2)
    sample_kernel(SampleInput<T> in, SampleResults out) {
  PLT_SHARED(int64_t, of_warps, kWarp);
  const int64_t row = blockIdx.x;
  if (!in.has(in.source(row))) return out.write_invalid(row);
  const KeyRow<T> keys = in.row(row);
  const FilterRule rule = in.rules[row];
  int32_t own_top;
  const RowSummary seen = summarize(keys, own_top);
  if (seen.has_bad() || seen.allowed == 0 || !rule.sound()) return out.write_invalid(row);

  const Cut cut = find_cut(keys, rule, seen, own_top);
  const DrawRow<T> draws{keys, cut, MassScale::at(seen.top, rule.temperature, in.vocab),
                         rule.greedy()};
  const bool scores = out.logprobs != nullptr, stats = out.rank != nullptr;
  const Tally sums = draws.tally(scores || stats, of_warps);
  const float log_kept = draws.greedy ? 0.0f : draws.log_mass(sums.kept);
  const float log_total = draws.greedy ? 0.0f : draws.log_mass(sums.total);
  const float log_plain = draws.log_mass(sums.plain);
  if (threadIdx.x == 0) {
    const float surprise = static_cast<float>(sums.weighted / sums.kept) * kLn2;
    const float share = static_cast<float>(sums.kept) / static_cast<float>(sums.total);
    out.write_row(row, true, sums.number, draws.greedy ? 1.0f : share,
                  draws.greedy ? 0.0f : fmaxf(log_kept - surprise, 0.0f), cut);
  }

  for (int s = threadIdx.x / kWarp; s < in.samples; s += blockDim.x / kWarp) {
    const uint64_t u = uniform_of(in.seed[row], in.position[row], s);
    const uint64_t target = multiply_high(u, static_cast<uint64_t>(sums.kept));
    const int token = walk(keys, draws, of_warps, static_cast<int64_t>(target));
    if (threadIdx.x % kWarp != 0) continue;
    const int64_t draw = row * in.samples + s;
    out.tokens[draw] = token;
    if (!scores) continue;
    const float below = minus_of(from_order_key(keys.key_at(token)), draws.scale.top);
    const float scaled = draws.greedy ? 0.0f : below / rule.temperature;
    out.write_logprobs(draw, below - log_plain, scaled - log_total, scaled - log_kept);
  }
  if (!stats) return;
  __syncthreads();  // the tokens
  for (int s = 0; s < in.samples; ++s) {
    const int64_t draw = row * in.samples + s;
    const int64_t rank = draws.rank(static_cast<int>(out.tokens[draw]));
    if (threadIdx.x == 0) out.rank[draw] = rank;
  }
}

// offsets[i] = counts[0] + ... + counts[i - 1], for i up to `rows`; one block.
__global__ void __launch_bounds__(kOffsetThreads)
    kept_offsets_kernel(const int64_t* counts, int64_t rows, int64_t* offsets) {
  PLT_SHARED(int64_t, of_warps, kWarp);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int64_t before = 0;
  if (threadIdx.x == 0) offsets[0] = 0;
  for (int64_t base = 0; base < rows; base += blockDim.x) {
    const int64_t i = base + threadIdx.x, mine = i < rows ? counts[i] : 0;
    const WarpScan scan(mine);
    if (threadIdx.x % kWarp == 0) of_warps[warp] = scan.all;
    __syncthreads();
    int64_t own = before + scan.before + mine;
    for (int w = 0; w < warps; ++w) {
      if (w < warp) own += of_warps[w];
      before += of_warps[w];
    }
    if (i < rows) offsets[i + 1] = own;
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kFilterThreads, 2)
    kept_ids_kernel(SampleInput<T> in, const int32_t* cuts, const int64_t* offsets, int32_t* ids) {
  PLT_SHARED(int64_t, of_warps, kWarp);
  const int64_t row = blockIdx.x;
  if (offsets[row] == offsets[row + 1]) return;  // invalid
  const KeyRow<T> keys = in.row(row);
  const Cut cut{cuts[2 * row], cuts[2 * row + 1]};
  const auto kept = [&](int32_t key, int id) -> int64_t { return cut.keeps(key, id); };
  sum_stretches(keys, kept, of_warps);
  const int warp = threadIdx.x / kWarp;
  int32_t* to = ids + offsets[row];
  for (int w = 0; w < warp; ++w) to += of_warps[w];
  keys.chunks_until(warp, [&](const int32_t (&key)[Chunk<T>::kSize], int first) {
    int64_t mine = 0;
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; ++i) mine += kept(key[i], first + i);
    const WarpScan scan(mine);
    int32_t* place = to + scan.before;
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; ++i)
      if (kept(key[i], first + i)) *place++ = first + i;
    to += scan.all;
    return false;
  });
}

template <class T>
void launch_sample(const SampleInput<T>& in, const SampleResults& out, cudaStream_t stream) {
  if (out.rows == 0) return;
  const int chunks = (in.vocab + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  PLT_LAUNCH(sample_kernel<T>, dim3(static_cast<unsigned>(out.rows)),
             dim3(threads_for(chunks, kFilterThreads)), 0, stream, in, out);
}

inline void launch_kept_offsets(const int64_t* counts, int64_t rows, int64_t* offsets,
                                cudaStream_t stream) {
  PLT_LAUNCH(kept_offsets_kernel, dim3(1), dim3(threads_for(rows, kOffsetThreads)), 0, stream,
             counts, rows, offsets);
}

template <class T>
void launch_kept_ids(const SampleInput<T>& in, int64_t rows, const int32_t* cuts,
                     const int64_t* offsets, int32_t* ids, cudaStream_t stream) {
  if (rows == 0) return;
  const int chunks = (in.vocab + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  PLT_LAUNCH(kept_ids_kernel<T>, dim3(static_cast<unsigned>(rows)),
             dim3(threads_for(chunks, kFilterThreads)), 0, stream, in, cuts, offsets, ids);
}

}  // namespace pyllmtune
