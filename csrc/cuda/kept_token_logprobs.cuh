// kept_token_logprobs: token_logprobs over the tokens that a sampler kept, row by row.
//
//   logits [outer, inner, V], or [entries] of the kept tokens alone; offsets [rows + 1], token_ids
//   [entries]: row i kept offsets[i] ... offsets[i + 1]
//   -> logprobs, entropy, logsumexp [rows], stats [2, rows] = (max, log S); sums run over the set,
//   and p is 0 outside it. A token outside its set has the logit -inf.
//
//   Forward reads a logit and 4 bytes of id an entry; backward reads both again and writes an
//   element of a gradient that holds zeros; rows without upstream gradient read their scalars.
//   One warp a row, a lane takes every 32nd entry: a row has the same bits in any batch.
//   Limits: a warp does a whole row; fewer than 2^31 rows. Offsets and ids that lead outside turn
//   their row into NaN.
#pragma once

#include "kept_sets.cuh"
#include "row_stats.cuh"
#include "token_logprobs.cuh"

namespace pyllmtune {

constexpr int kKeptThreads = 128;  // four rows a block

struct KeptRows {
  ScoreRows score;
  KeptSets kept;

  // The row of this warp; it may lie beyond the last.
  __device__ int64_t row() const {
    return blockIdx.x * int64_t(kKeptThreads / kWarp) + threadIdx.x / kWarp;
  }
};

// Where the element of an entry lies: in its row of V, or in a flat [entries].
template <class T>
struct KeptEntries {
  T* at;
  bool flat;
  RowLayout layout;

  __device__ T* operator()(int64_t row, int64_t entry, int id) const {
    return flat ? at + entry : at + layout.offset(static_cast<uint32_t>(row)) + id;
  }
};

template <class T>
__global__ void __launch_bounds__(kKeptThreads)
    kept_token_logprobs_kernel(KeptEntries<const T> logits, KeptRows rows, Scores out) {
  const int64_t row = rows.row();
  const int lane = threadIdx.x % kWarp;
  if (row >= rows.score.count) return;
  if (!rows.score.selected(row)) {
    if (lane == 0) out.write(row, {0.0f, 0.0f, 0.0f, 0.0f}, 0.0f);
    return;
  }
  const float inv_temperature = rows.score.inv_temperature(row);
  const float bits_per_logit = inv_temperature * kLog2E;
  const int64_t token = rows.score.tokens[row];
  const bool in_bounds = rows.kept.in_bounds(row);
  const int64_t end = in_bounds ? rows.kept.offsets[row + 1] : 0;
  PartStats part{-INFINITY, in_bounds ? 0.0f : NAN, 0.0f};
  float target = -INFINITY;
  for (int64_t entry = in_bounds ? rows.kept.offsets[row] + lane : 0; entry < end; entry += kWarp) {
    const int id = rows.kept.ids[entry];
    const bool exists = id >= 0 && id < rows.score.vocab;
    const float z[1] = {exists ? to_float(*logits(row, entry, id)) : NAN};
    if (id == token) target = z[0];
    part.add(z, bits_per_logit);
  }
  part = part.of_warp(bits_per_logit);
  target = warp_max(target);
  if (lane != 0) return;
  const SoftmaxStats<float> whole{part.max, part.sum, part.weighted * kLn2};
  out.write(row, finish(whole, target, inv_temperature), whole.max);
}

// `grad` holds zeros.
template <class T>
__global__ void __launch_bounds__(kKeptThreads)
    kept_token_logprobs_backward_kernel(KeptEntries<const T> logits, KeptEntries<T> grad,
                                        KeptRows rows, ScoreUpstream up) {
  const int64_t row = rows.row();
  if (row >= rows.score.count || !rows.kept.in_bounds(row)) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t end = rows.kept.offsets[row + 1];
  const float max = up.max[row], log_sum = up.log_sum[row];
  const float g = up.grad_logprobs[row], h = up.grad_entropy[row], q = up.grad_logsumexp[row];
  const bool nothing_allowed = max == -INFINITY && log_sum == 0.0f;
  if (!rows.score.selected(row) || (g == 0.0f && h == 0.0f && q == 0.0f) || nothing_allowed) return;
  const float inv_temperature = rows.score.inv_temperature(row);
  const auto grad_of = score_gradient(g, h, q, up.entropy[row], inv_temperature);
  const RowGradient gradient = row_gradient(max, log_sum, inv_temperature, grad_of);
  const int64_t token = rows.score.tokens[row];
  for (int64_t entry = rows.kept.offsets[row] + lane; entry < end; entry += kWarp) {
    const int id = rows.kept.ids[entry];
    if (id < 0 || id >= rows.score.vocab) continue;
    const float dz = gradient(to_float(*logits(row, entry, id)));
    *grad(row, entry, id) = from_float<T>(dz + (id == token ? grad_of.at_target : 0.0f));
  }
}

inline dim3 kept_grid(const KeptRows& rows) {
  constexpr int kRows = kKeptThreads / kWarp;
  return dim3(static_cast<unsigned>((rows.score.count + kRows - 1) / kRows));
}

template <class T>
void launch_kept_token_logprobs(KeptEntries<const T> logits, KeptRows rows, Scores out,
                                cudaStream_t stream) {
  if (rows.score.count == 0) return;
  PLT_LAUNCH(kept_token_logprobs_kernel<T>, kept_grid(rows), dim3(kKeptThreads), 0, stream, logits,
             rows, out);
}

template <class T>
void launch_kept_token_logprobs_backward(KeptEntries<const T> logits, KeptEntries<T> grad,
                                         KeptRows rows, ScoreUpstream up, cudaStream_t stream) {
  if (rows.score.count == 0) return;
  PLT_LAUNCH(kept_token_logprobs_backward_kernel<T>, kept_grid(rows), dim3(kKeptThreads), 0, stream,
             logits, grad, rows, up);
}

}  // namespace pyllmtune
