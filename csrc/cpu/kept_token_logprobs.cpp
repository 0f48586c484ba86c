// kept_token_logprobs: token_logprobs over the tokens that a sampler kept, row by row.
//
//   logits [outer, inner, V], or [entries] of the kept tokens alone; offsets [rows + 1], token_ids
//   [entries]: row i kept offsets[i] ... offsets[i + 1]
//   -> logprobs, entropy, logsumexp [rows], stats [2, rows] = (max, log S); sums run over the set,
//   and p is 0 outside it. A token outside its set has the logit -inf.
//
//   Forward reads a logit and 4 bytes of id an entry; backward reads both again and writes an
//   element. The rest of a [outer, inner, V] gradient is fresh memory, which is zero, where it is
//   large. A row's logits are gathered into a tile, and from there on it is token_logprobs.
//   Limits: a thread does a whole row.
#include <torch/csrc/stable/library.h>

#include "kept_sets.h"
#include "memory.h"
#include "row_gradient.h"
#include "row_stats.h"
#include "rows.h"
#include "simd.h"
#include "types.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

struct KeptRows : KeptSets {
  const int64_t* tokens;
  const bool* mask;          // or null
  const void* temperatures;  // or null: float or double
  double temperature;

  bool selected(int64_t row) const { return mask == nullptr || mask[row]; }
  template <class F>
  F inv_temperature(int64_t row) const {
    return F(1) /
           (temperatures == nullptr ? F(temperature) : static_cast<const F*>(temperatures)[row]);
  }
};

// Where the element of an entry lies: in its row of V, or in a flat [entries].
template <class T>
struct Entries {
  T* at;
  bool flat;
  RowLayout layout;
  const int32_t* ids;

  T* operator()(int64_t row, int64_t entry) const {
    return flat ? at + entry : at + layout.offset(row) + ids[entry];
  }
};

// Fills `tile` with the logits of entries first ... first + n; returns where `token` is, or -1.
template <class T>
int64_t gather(Entries<const T> logits, int64_t row, int64_t first, int64_t n, int64_t token,
               scalar_of<T>* tile) {
  int64_t target = -1;
  for (int64_t k = 0; k < n; ++k) {
    tile[k] = to_scalar(*logits(row, first + k));
    if (logits.ids[first + k] == token) target = k;
  }
  return target;
}

template <class T>
void forward(Entries<const T> logits, const KeptRows& rows, scalar_of<T>* logprobs,
             scalar_of<T>* entropy, scalar_of<T>* logsumexp, scalar_of<T>* stats) {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;
  parallel_for(rows.rows, rows.grain(1), [&](int64_t begin, int64_t end) {
    F tile[kTile];
    for (int64_t row = begin; row < end; ++row) {
      if (!rows.selected(row)) {
        logprobs[row] = entropy[row] = logsumexp[row] = stats[row] = stats[rows.rows + row] = F(0);
        continue;
      }
      const F inv_temperature = rows.inv_temperature<F>(row);
      const int64_t last = rows.offsets[row + 1];
      SoftmaxStats<F> whole;
      F token_logit = -std::numeric_limits<F>::infinity();
      for (int64_t first = rows.offsets[row]; first < last; first += kTile) {
        const int64_t n = std::min(kTile, last - first);
        const int64_t target = gather(logits, row, first, n, rows.tokens[row], tile);
        if (target >= 0) token_logit = tile[target];
        whole = merge(whole, tile_stats<V, true>(tile, n, inv_temperature), inv_temperature);
      }
      const TokenScore<F> score = finish(whole, token_logit, inv_temperature);
      logprobs[row] = score.logprob;
      entropy[row] = score.entropy;
      logsumexp[row] = score.logsumexp;
      stats[row] = whole.max;
      stats[rows.rows + row] = score.log_sum;
    }
  });
}

// `out` holds zeros where `out_is_zero`; else what is not written below is cleared first.
template <class T>
void backward(Entries<const T> logits, Entries<T> out, int64_t vocab, bool out_is_zero,
              const KeptRows& rows, const scalar_of<T>* entropy, const scalar_of<T>* stats,
              const scalar_of<T>* grad_logprobs, const scalar_of<T>* grad_entropy,
              const scalar_of<T>* grad_logsumexp) {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;
  const F none = -std::numeric_limits<F>::infinity();
  parallel_for(rows.rows, rows.grain(1), [&](int64_t begin, int64_t end) {
    F tile[kTile];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t own = rows.offsets[row], last = rows.offsets[row + 1];
      const bool idle =
          grad_logprobs[row] == F(0) && grad_entropy[row] == F(0) && grad_logsumexp[row] == F(0);
      const F top = stats[row], log_sum = stats[rows.rows + row];
      const bool nothing_allowed = top == none && log_sum == F(0);
      const bool skipped = !rows.selected(row) || idle || nothing_allowed;
      if (!out_is_zero && !out.flat) memset(out.at + out.layout.offset(row), 0, vocab * sizeof(T));
      if (!out_is_zero && out.flat && skipped) memset(out.at + own, 0, (last - own) * sizeof(T));
      if (skipped) continue;
      const F inv_temperature = rows.inv_temperature<F>(row);
      const auto grad = score_gradient(grad_logprobs[row], grad_entropy[row], grad_logsumexp[row],
                                       entropy[row], inv_temperature);
      for (int64_t first = own; first < last; first += kTile) {
        const int64_t n = std::min(kTile, last - first);
        const int64_t target = gather(logits, row, first, n, rows.tokens[row], tile);
        stripe_gradient<V>(tile, tile, n, top, log_sum, inv_temperature, grad, target);
        for (int64_t k = 0; k < n; ++k) from_scalar(tile[k], out(row, first + k));
      }
    }
  });
}

KeptRows check_rows(const Tensor& logits, const Tensor& offsets, const Tensor& token_ids,
                    const Tensor& tokens, double temperature, const std::optional<Tensor>& per_row,
                    const std::optional<Tensor>& mask) {
  const bool flat = logits.dim() == 1;
  STD_TORCH_CHECK(logits.is_cpu() && (flat || logits.dim() == 3),
                  "logits must be [outer, inner, V] or [entries] on the CPU");
  const int64_t rows = tokens.numel(), entries = token_ids.numel();
  const int64_t vocab = flat ? INT32_MAX : logits.size(2);
  STD_TORCH_CHECK(logits.size(-1) <= 1 || logits.stride(-1) == 1,
                  "logits must be contiguous along their last axis");
  STD_TORCH_CHECK(flat ? logits.numel() == entries : logits.size(0) * logits.size(1) == rows,
                  "logits must have one entry a token id, or one row a token");
  check_flat(tokens, rows, ScalarType::Long, "tokens");
  const auto dtype =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (per_row) check_flat(*per_row, rows, dtype, "row_temperature");
  if (mask) check_flat(*mask, rows, ScalarType::Bool, "mask");
  const KeptRows out{check_kept(offsets, token_ids, rows, vocab), data<const int64_t>(tokens),
                     mask ? data<const bool>(*mask) : nullptr,
                     per_row ? per_row->const_data_ptr() : nullptr, temperature};
  for (int64_t row = 0; row < rows; ++row) {
    if (!out.selected(row)) continue;
    const double t = dtype == ScalarType::Double ? 1.0 / out.inv_temperature<double>(row)
                                                 : 1.0 / out.inv_temperature<float>(row);
    STD_TORCH_CHECK(t > 0.0 && t < std::numeric_limits<double>::infinity(),
                    "temperature must be positive, got ", t, " in row ", row);
  }
  return out;
}

RowLayout layout_of(const Tensor& logits) {
  return logits.dim() == 1 ? RowLayout{1, 0, 0} : row_layout(logits);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kept_token_logprobs(
    const Tensor& logits, const Tensor& offsets, const Tensor& token_ids, const Tensor& tokens,
    double temperature, std::optional<Tensor> row_temperature, std::optional<Tensor> mask) {
  const KeptRows rows =
      check_rows(logits, offsets, token_ids, tokens, temperature, row_temperature, mask);
  const auto dtype =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor logprobs = torch::stable::new_empty(logits, {rows.rows}, dtype);
  Tensor entropy = torch::stable::new_empty(logits, {rows.rows}, dtype);
  Tensor logsumexp = torch::stable::new_empty(logits, {rows.rows}, dtype);
  Tensor stats = torch::stable::new_empty(logits, {2, rows.rows}, dtype);
  if (rows.rows > 0)
    with_element_type(logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      forward(
          Entries<const T>{data<const T>(logits), logits.dim() == 1, layout_of(logits), rows.ids},
          rows, data<scalar_of<T>>(logprobs), data<scalar_of<T>>(entropy),
          data<scalar_of<T>>(logsumexp), data<scalar_of<T>>(stats));
    });
  return {logprobs, entropy, logsumexp, stats};
}

Tensor kept_token_logprobs_backward(const Tensor& logits, const Tensor& offsets,
                                    const Tensor& token_ids, const Tensor& tokens,
                                    double temperature, std::optional<Tensor> row_temperature,
                                    std::optional<Tensor> mask, const Tensor& entropy,
                                    const Tensor& stats, const Tensor& grad_logprobs,
                                    const Tensor& grad_entropy, const Tensor& grad_logsumexp) {
  const KeptRows rows =
      check_rows(logits, offsets, token_ids, tokens, temperature, row_temperature, mask);
  const bool flat = logits.dim() == 1;
  const FreshTensor grad =
      flat ? FreshTensor{torch::stable::new_empty(logits, logits.sizes()), false}
           : fresh_like(logits, Touched::kLittle);
  if (rows.rows == 0) return grad.tensor;
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using F = scalar_of<T>;
    auto per_row = [&](const Tensor& x, const char* name, int64_t times = 1) {
      check_flat(x, times * rows.rows, kScalarType<F>, name);
      return data<const F>(x);
    };
    backward(Entries<const T>{data<const T>(logits), flat, layout_of(logits), rows.ids},
             Entries<T>{data<T>(grad.tensor), flat, layout_of(grad.tensor), rows.ids},
             logits.size(-1), grad.is_zero, rows, per_row(entropy, "entropy"),
             per_row(stats, "stats", 2), per_row(grad_logprobs, "grad_logprobs"),
             per_row(grad_entropy, "grad_entropy"), per_row(grad_logsumexp, "grad_logsumexp"));
  });
  return grad.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) {
  m.impl("kept_token_logprobs", TORCH_BOX(&kept_token_logprobs));
  m.impl("kept_token_logprobs_backward", TORCH_BOX(&kept_token_logprobs_backward));
}

}  // namespace pyllmtune
