// beam_step: the best continuations of the beams of each item, from one read of the logits.
//
//   logits [batch, beams, V], beam_scores [batch, beams]
//     -> scores, tokens, parents, is_eos [batch, candidates], valid [batch, beams]
//   score = beam_score + (z - max)/T - log S,   S = sum_j e^((z_j - max)/T)
//
//   beam_rows_kernel: one block for each part of a row, 8,192 logits: the part's maximum and sum,
//   and its `kept` best tokens. Each thread's own maximum is known from the first sweep; the
//   kept-th largest of these is at most the kept-th largest logit, so a second sweep, out of the
//   cache, lists the few tokens that reach it. Where they are many (equal logits) a search finds
//   the exact cut (row_filter.cuh).
//   beam_merge_kernel: one block an item joins the parts and takes candidate after candidate: each
//   thread holds the best of its entries, the block the best of these, and whoever gave the winner
//   looks for its next. Order: key, lower beam, higher logit, lower id; the key is the score less
//   the penalties.
//   V elements read from memory a row are the floor; beside them 8 * kept bytes a part are written
//   and read. Parts depend on V alone, so a row has the same bits in any batch.
//   Limits: V <= 2^27, fewer than 2^31 rows.
#pragma once

#include "../math/online_softmax.h"
#include "row_filter.cuh"

namespace pyllmtune {

constexpr int kBeamThreads = 256;
constexpr int kBeamPart = 8192;    // 32 logits a thread; four blocks of float32 fit in an L1
constexpr int kBeamListed = 2048;  // keys and ids in shared memory, 16 KiB
constexpr float kBitsPerNat = 1.44269504f;

struct BeamRequest {
  int beams, vocab, candidates, groups;
  const float* beam_scores;  // [batch, beams]
  PerRow<float> temperature;
  const int64_t* widths;  // [batch], or null
  const int64_t* eos;     // [eos_count]
  int eos_count;
  float penalty;

  __host__ __device__ int parts() const { return (vocab + kBeamPart - 1) / kBeamPart; }
  __host__ __device__ int group_size() const { return beams / groups; }
  // Tokens that a part of a row offers: a penalty can put as many behind others as the groups
  // before go on with.
  __host__ __device__ int kept() const {
    const int most = candidates / groups + beams - group_size();
    return most < vocab ? most : vocab;
  }
  __device__ int64_t width(int64_t item) const { return widths == nullptr ? beams : widths[item]; }
  __device__ bool live(int64_t row) const {
    return order_key(beam_scores[row]) != kNoneKey && row % beams < width(row / beams);
  }
  __device__ float inv_temperature(int64_t row) const { return 1.0f / temperature[row]; }
  __device__ bool ends(int64_t token) const {
    for (int i = 0; i < eos_count; ++i)
      if (eos[i] == token) return true;
    return false;
  }
};

template <class T>
struct BeamInput {
  const T* logits;
  RowLayout layout;
  AllowedTokens allowed;
  bool whole_sum;  // the softmax is over tokens that are not allowed, too

  __device__ KeyRow<T> part(int64_t row, int part, int vocab, bool only_allowed) const {
    KeyRow<T> keys = allowed.of(logits + layout.offset(static_cast<uint32_t>(row)), row, vocab);
    const int first = part * kBeamPart;
    if (!only_allowed) keys.allowed = nullptr, keys.allowed_bits = nullptr;
    if (keys.allowed != nullptr) keys.allowed += first;
    if (keys.allowed_bits != nullptr) keys.allowed_bits += first / 32;
    keys.logits += first, keys.vocab = min(kBeamPart, vocab - first);
    return keys;
  }
};

// What the first kernel leaves for the second.
struct BeamParts {
  float* stats;    // [rows, parts, 2] maximum and sum; then [row, 0] maximum and log of all
  int32_t* keys;   // [rows, parts, kept] order_key, kNoneKey where empty
  int32_t* ids;    // [rows, parts, kept]
  int32_t* taken;  // [batch, beams] tokens that groups go on with
};

struct BeamResults {
  float* scores;  // [batch, candidates]
  int64_t *tokens, *parents;
  bool* is_eos;
  bool* valid;  // [batch, beams]
};

__device__ inline float exp_below(int32_t key, int32_t top, float bits_per_logit) {
  return exp2_fast((from_order_key(key) - from_order_key(top)) * bits_per_logit);
}

// The rank-th largest of one key a thread, which is at most the rank-th largest of all.
__device__ inline int32_t floor_of_tops(int32_t own, int rank, int32_t* tops) {
  PLT_SHARED(int32_t, floor, 1);
  if (rank >= static_cast<int>(blockDim.x)) return kNoneKey + 1;
  tops[threadIdx.x] = own;
  __syncthreads();
  int ahead = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x); ++i)
    ahead += tops[i] > own || (tops[i] == own && i < static_cast<int>(threadIdx.x));
  if (ahead == rank) floor[0] = max(own, kNoneKey + 1);
  __syncthreads();
  return floor[0];
}

template <class T>
__global__ void __launch_bounds__(kBeamThreads, 4)  // 64 registers; of 48 some were spilled
    beam_rows_kernel(BeamInput<T> in, BeamRequest request, BeamParts out) {
  PLT_SHARED(int32_t, listed, 2 * kBeamListed);  // keys, then ids
  PLT_SHARED(int, size, 1);
  const int64_t row = blockIdx.x, at = row * request.parts() + blockIdx.y;
  if (!request.live(row)) return;
  const int kept = request.kept(), first = blockIdx.y * kBeamPart;
  const KeyRow<T> keys = in.part(row, blockIdx.y, request.vocab, true);
  const float bits_per_logit = request.inv_temperature(row) * kBitsPerNat;
  int32_t* const out_keys = out.keys + at * kept;
  int32_t* const out_ids = out.ids + at * kept;
  float* const stats = out.stats + at * 2;

  int32_t own_top;
  const RowSummary seen = summarize(keys, own_top);
  if (seen.has_bad()) {
    if (threadIdx.x == 0) stats[0] = 0.0f, stats[1] = NAN;
    return;
  }
  if (threadIdx.x == 0) size[0] = 0;
  const int32_t floor = floor_of_tops(own_top, kept - 1, listed);
  __syncthreads();  // the tops, before tokens are listed over them

  float sum = 0.0f;
  keys.each([&](int32_t key, int id) {
    if (key > kNoneKey) sum += exp_below(key, seen.top, bits_per_logit);
    if (key < floor) return;
    const int place = atomicAdd(size, 1);  // any order: they are ranked
    if (place < kBeamListed) listed[place] = key, listed[kBeamListed + place] = id;
  });
  sum = block_sum(sum);
  float top = from_order_key(seen.top);
  if (in.whole_sum) {
    const KeyRow<T> whole = in.part(row, blockIdx.y, request.vocab, false);
    int32_t unused;
    const RowSummary all = summarize(whole, unused);
    sum = 0.0f;
    whole.each([&](int32_t key, int) {
      if (key > kNoneKey) sum += exp_below(key, all.top, bits_per_logit);
    });
    sum = all.has_bad() ? NAN : block_sum(sum);
    top = from_order_key(all.top);
  }
  if (threadIdx.x == 0) stats[0] = top, stats[1] = sum;

  const int found = size[0];
  if (found <= kBeamListed) {
    for (int i = threadIdx.x; i < found; i += blockDim.x) {
      const Cut own{listed[i], listed[kBeamListed + i]};
      int rank = -1;  // it is not ahead of itself
      for (int j = 0; j < found; ++j) rank += own.keeps(listed[j], listed[kBeamListed + j]);
      if (rank < kept) out_keys[rank] = own.key, out_ids[rank] = first + own.id;
    }
  } else {
    __syncthreads();  // the size has been read
    const Candidates<T> all{keys, listed, size};
    Cut cut{kNoneKey + 1, INT32_MAX};
    if (seen.allowed > kept)
      cut = cut_of(keys, all.search(seen.top, seen.allowed, kept, Weight{{}, true}));
    if (threadIdx.x == 0) size[0] = 0;
    __syncthreads();
    keys.each([&](int32_t key, int id) {
      if (!cut.keeps(key, id)) return;
      const int place = atomicAdd(size, 1);
      out_keys[place] = key, out_ids[place] = first + id;
    });
  }
  for (int i = min(seen.allowed, kept) + threadIdx.x; i < kept; i += blockDim.x)
    out_keys[i] = kNoneKey;
}

// A candidate, as it is compared: words only.
struct BeamEntry {
  int32_t key, beam, logit, token;  // key and logit by order_key

  __device__ bool exists() const { return key > kNoneKey; }
  __device__ bool ahead_of(const BeamEntry& x) const {
    if (key != x.key) return key > x.key;
    if (beam != x.beam) return beam < x.beam;
    return logit > x.logit || (logit == x.logit && token < x.token);
  }
};

// The entries of one item, a group's at a time; `taken_count` tokens have been taken by groups
// before.
struct BeamItem {
  const BeamRequest& request;
  const BeamParts& parts;
  int64_t item;
  int first_beam, beams, taken_count;

  __device__ float score(int beam, int32_t logit) const {
    const int64_t row = item * request.beams + beam;
    const float* stats = parts.stats + row * request.parts() * 2;  // maximum, log of the sum
    const float log_p =
        fmaf(from_order_key(logit) - stats[0], request.inv_temperature(row), -stats[1]);
    return request.beam_scores[row] + log_p;
  }

  // The best of this thread's entries behind `last`.
  __device__ BeamEntry best_behind(const BeamEntry& last) const {
    const int64_t of_beam = static_cast<int64_t>(request.parts()) * request.kept();
    const int64_t base = (item * request.beams + first_beam) * of_beam;
    BeamEntry best{kNoneKey, 0, kNoneKey, 0};
    for (int64_t i = threadIdx.x; i < beams * of_beam; i += blockDim.x) {
      const int beam = first_beam + static_cast<int>(i / of_beam);
      const int64_t row = item * request.beams + beam;
      if (!request.live(row) || !(parts.stats[row * request.parts() * 2 + 1] >= 0.0f)) continue;
      const int32_t logit = parts.keys[base + i];
      if (logit == kNoneKey) continue;
      const int32_t token = parts.ids[base + i];
      int times = 0;
      for (int j = 0; j < taken_count; ++j) times += parts.taken[item * request.beams + j] == token;
      const float key = fmaf(-request.penalty, static_cast<float>(times), score(beam, logit));
      const BeamEntry entry{order_key(key), beam, logit, token};
      if (last.ahead_of(entry) && entry.ahead_of(best)) best = entry;
    }
    return best;
  }
};

__device__ inline BeamEntry best_of_block(const BeamEntry& mine) {  // in every thread
  const BeamEntry nothing{kNoneKey, 0, kNoneKey, 0};
  return block_broadcast(block_reduce(mine, nothing, [](const BeamEntry& part) {
    return warp_join(part,
                     [](const BeamEntry& a, const BeamEntry& b) { return b.ahead_of(a) ? b : a; });
  }));
}

// Joins the parts of a beam; its log-sum is NaN if the beam is dropped. Returns whether it is
// sound.
__device__ inline bool join_parts(const BeamRequest& request, const BeamParts& parts, int64_t row) {
  const int count = request.parts();
  float* stats = parts.stats + row * count * 2;
  SoftmaxStats<float> whole;
  for (int part = 0; part < count; ++part)
    whole =
        merge(whole, {stats[2 * part], stats[2 * part + 1], 0.0f}, request.inv_temperature(row));
  bool sound = whole.sum == whole.sum && order_key(request.beam_scores[row]) < kInfKey &&
               order_key(request.beam_scores[row]) > kNoneKey;
  bool offers = false;
  for (int part = 0; sound && part < count; ++part)
    offers = offers || parts.keys[(row * count + part) * request.kept()] > kNoneKey;
  sound = sound && offers;
  stats[0] = whole.max;
  stats[1] = sound ? logf(whole.sum) : NAN;
  return sound;
}

__global__ void __launch_bounds__(kBeamThreads)
    beam_merge_kernel(BeamRequest request, BeamParts parts, BeamResults out) {
  const int64_t item = blockIdx.x, width = request.width(item);
  for (int beam = threadIdx.x; beam < request.beams; beam += blockDim.x) {
    const int64_t row = item * request.beams + beam;
    out.valid[row] = !request.live(row) || join_parts(request, parts, row);
  }
  __syncthreads();

  const int size = request.group_size(), slots = request.candidates / request.groups;
  const int limit = static_cast<int>(slots * width / request.beams);
  int taken = 0;
  for (int group = 0; group < request.groups; ++group) {
    const BeamItem entries{request, parts, item, group * size, size, taken};
    BeamEntry mine = entries.best_behind({INT32_MAX, 0, 0, 0});
    BeamEntry next{INT32_MAX, 0, 0, 0};
    int going_on = 0;
    for (int slot = 0; slot < slots; ++slot) {
      if (slot < limit && next.exists()) {
        next = best_of_block(mine);
        if (mine.beam == next.beam && mine.token == next.token) mine = entries.best_behind(next);
      } else {
        next.key = kNoneKey;
      }
      const bool filled = next.exists(), ends = filled && request.ends(next.token);
      if (threadIdx.x == 0) {
        const int64_t at = item * request.candidates + group * slots + slot;
        out.scores[at] = filled ? entries.score(next.beam, next.logit) : -INFINITY;
        out.tokens[at] = filled ? next.token : -1;
        out.parents[at] = filled ? next.beam : 0;
        out.is_eos[at] = ends;
        if (filled && !ends && going_on < size)
          parts.taken[item * request.beams + taken + going_on] = next.token;
      }
      if (filled && !ends && going_on < size) ++going_on;
    }
    taken += going_on;
    __syncthreads();  // the tokens taken
  }
}

template <class T>
void launch_beam_step(const BeamInput<T>& in, int64_t batch, const BeamRequest& request,
                      const BeamParts& parts, const BeamResults& out, cudaStream_t stream) {
  if (batch == 0) return;
  const int length = request.vocab < kBeamPart ? request.vocab : kBeamPart;
  const int chunks = (length + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  const dim3 grid(static_cast<unsigned>(batch * request.beams),
                  static_cast<unsigned>(request.parts()));
  PLT_LAUNCH(beam_rows_kernel<T>, grid, dim3(threads_for(chunks, kBeamThreads)), 0, stream, in,
             request, parts);
  const int64_t entries =
      static_cast<int64_t>(request.group_size()) * request.parts() * request.kept();
  PLT_LAUNCH(beam_merge_kernel, dim3(static_cast<unsigned>(batch)),
             dim3(threads_for(entries, kBeamThreads)), 0, stream, request, parts, out);
}

}  // namespace pyllmtune
