// token_logprobs: log-prob of one token a row, entropy and logsumexp, from one read of the logits;
// and their gradient.
//
//   logits [outer, inner, V] -> logprobs, entropy, logsumexp [outer, inner], stats [2, outer,
//   inner] = (max, log S) dz_j = p_j (constant + slope log p_j) + 1[j = y] at_target
//   (csrc/math/online_softmax.h) Forward reads V elements a row and writes 20 bytes. Backward reads
//   V and writes V; rows without upstream gradient are neither read nor, where the gradient is
//   fresh memory, written. A tile that fits the first-level cache is read twice, for its maximum
//   and for its sums; memory is read once. float32 arithmetic for float32, bfloat16 and float16;
//   float64 through the same code, one lane at a time.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../math/online_softmax.h"
#include "memory.h"
#include "row_gradient.h"
#include "row_stats.h"
#include "rows.h"
#include "simd.h"
#include "types.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

struct Rows {
  int64_t count, vocab;
  RowLayout layout;
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

template <class T>
void forward(const T* logits, const Rows& rows, scalar_of<T>* logprobs, scalar_of<T>* entropy,
             scalar_of<T>* logsumexp, scalar_of<T>* stats) {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;
  const int64_t stripes = stripes_of(rows.vocab);
  std::vector<SoftmaxStats<F>> parts(rows.count * stripes);
  for_each_stripe(rows.count, rows.vocab,
                  [&](int64_t row, int64_t stripe, int64_t first, int64_t length) {
                    if (!rows.selected(row)) return;
                    const T* z = logits + rows.layout.offset(row) + first;
                    parts[row * stripes + stripe] =
                        stripe_stats<V, true>(z, length, rows.inv_temperature<F>(row));
                  });
  for (int64_t row = 0; row < rows.count; ++row) {
    if (!rows.selected(row)) {
      logprobs[row] = entropy[row] = logsumexp[row] = stats[row] = stats[rows.count + row] = F(0);
      continue;
    }
    const F inv_temperature = rows.inv_temperature<F>(row);
    SoftmaxStats<F> whole = parts[row * stripes];
    for (int64_t k = 1; k < stripes; ++k)
      whole = merge(whole, parts[row * stripes + k], inv_temperature);
    const F target = to_scalar(logits[rows.layout.offset(row) + rows.tokens[row]]);
    const TokenScore<F> score = finish(whole, target, inv_temperature);
    logprobs[row] = score.logprob;
    entropy[row] = score.entropy;
    logsumexp[row] = score.logsumexp;
    stats[row] = whole.max;
    stats[rows.count + row] = score.log_sum;
  }
}

// `out` holds zeros where `out_is_zero`; else rows without gradient are cleared. It has its own
// layout and may be `logits`.
template <class T>
void backward(const T* logits, T* out, RowLayout out_layout, bool out_is_zero, const Rows& rows,
              const scalar_of<T>* entropy, const scalar_of<T>* stats,
              const scalar_of<T>* grad_logprobs, const scalar_of<T>* grad_entropy,
              const scalar_of<T>* grad_logsumexp) {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;
  const F none = -std::numeric_limits<F>::infinity();
  for_each_stripe(rows.count, rows.vocab, [&](int64_t row, int64_t, int64_t first, int64_t length) {
    T* dz = out + out_layout.offset(row) + first;
    const bool idle =
        grad_logprobs[row] == F(0) && grad_entropy[row] == F(0) && grad_logsumexp[row] == F(0);
    const F top = stats[row], log_sum = stats[rows.count + row];
    const bool nothing_allowed = top == none && log_sum == F(0);  // else a NaN hides among the -inf
    if (!rows.selected(row) || idle || nothing_allowed) {
      if (!out_is_zero) memset(dz, 0, length * sizeof(T));
      return;
    }
    const T* z = logits + rows.layout.offset(row) + first;
    const F inv_temperature = rows.inv_temperature<F>(row);
    const auto grad = score_gradient(grad_logprobs[row], grad_entropy[row], grad_logsumexp[row],
                                     entropy[row], inv_temperature);
    stripe_gradient<V>(z, dz, length, top, log_sum, inv_temperature, grad,
                       rows.tokens[row] - first);
  });
}

Rows check_rows(const Tensor& logits, const Tensor& tokens, double temperature,
                const std::optional<Tensor>& per_row, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 3,
                  "logits must be [outer, inner, V] on the CPU");
  const int64_t rows = logits.size(0) * logits.size(1), vocab = logits.size(2);
  STD_TORCH_CHECK(vocab > 0 && (vocab == 1 || logits.stride(2) == 1),
                  "logits must be contiguous along V > 0");
  check_flat(tokens, rows, ScalarType::Long, "tokens");
  const auto dtype =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor temperatures;
  if (per_row) check_flat(*per_row, rows, dtype, "row_temperature");
  if (mask) check_flat(*mask, rows, ScalarType::Bool, "mask");
  Rows out{rows,
           vocab,
           row_layout(logits),
           static_cast<const int64_t*>(tokens.const_data_ptr()),
           mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
           per_row ? per_row->const_data_ptr() : nullptr,
           temperature};
  for (int64_t row = 0; row < rows; ++row) {
    if (!out.selected(row)) continue;
    STD_TORCH_CHECK(out.tokens[row] >= 0 && out.tokens[row] < vocab, "tokens must be in [0, ",
                    vocab, "), got ", out.tokens[row], " in row ", row);
    const double t = dtype == ScalarType::Double ? 1.0 / out.inv_temperature<double>(row)
                                                 : 1.0 / out.inv_temperature<float>(row);
    STD_TORCH_CHECK(t > 0.0 && t < std::numeric_limits<double>::infinity(),
                    "temperature must be positive, got ", t, " in row ", row);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits,
                                                          const Tensor& tokens, double temperature,
                                                          std::optional<Tensor> row_temperature,
                                                          std::optional<Tensor> mask, bool) {
  const Rows rows = check_rows(logits, tokens, temperature, row_temperature, mask);
  const auto dtype =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t outer = logits.size(0), inner = logits.size(1);
  Tensor logprobs = torch::stable::new_empty(logits, {outer, inner}, dtype);
  Tensor entropy = torch::stable::new_empty(logits, {outer, inner}, dtype);
  Tensor logsumexp = torch::stable::new_empty(logits, {outer, inner}, dtype);
  Tensor stats = torch::stable::new_empty(logits, {2, outer, inner}, dtype);
  if (rows.count > 0)
    with_element_type(logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      forward(data<const T>(logits), rows, data<scalar_of<T>>(logprobs),
              data<scalar_of<T>>(entropy), data<scalar_of<T>>(logsumexp),
              data<scalar_of<T>>(stats));
    });
  return {logprobs, entropy, logsumexp, stats};
}

void gradient_into(const Tensor& out, bool out_is_zero, const Tensor& logits, const Tensor& tokens,
                   double temperature, const std::optional<Tensor>& row_temperature,
                   const std::optional<Tensor>& mask, const Tensor& entropy, const Tensor& stats,
                   const Tensor& grad_logprobs, const Tensor& grad_entropy,
                   const Tensor& grad_logsumexp) {
  const Rows rows = check_rows(logits, tokens, temperature, row_temperature, mask);
  if (rows.count == 0) return;
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using F = scalar_of<T>;
    auto per_row = [&](const Tensor& x, const char* name, int64_t times = 1) {
      check_flat(x, times * rows.count, kScalarType<F>, name);
      return data<const F>(x);
    };
    backward(data<const T>(logits), data<T>(out), row_layout(out), out_is_zero, rows,
             per_row(entropy, "entropy"), per_row(stats, "stats", 2),
             per_row(grad_logprobs, "grad_logprobs"), per_row(grad_entropy, "grad_entropy"),
             per_row(grad_logsumexp, "grad_logsumexp"));
  });
}

Tensor token_logprobs_backward(const Tensor& logits, const Tensor& tokens, double temperature,
                               std::optional<Tensor> row_temperature, std::optional<Tensor> mask,
                               const Tensor& entropy, const Tensor& stats,
                               const Tensor& grad_logprobs, const Tensor& grad_entropy,
                               const Tensor& grad_logsumexp) {
  const FreshTensor grad = fresh_like(logits);
  gradient_into(grad.tensor, grad.is_zero, logits, tokens, temperature, row_temperature, mask,
                entropy, stats, grad_logprobs, grad_entropy, grad_logsumexp);
  return grad.tensor;
}

void token_logprobs_backward_inplace(const Tensor& logits, const Tensor& tokens, double temperature,
                                     std::optional<Tensor> row_temperature,
                                     std::optional<Tensor> mask, const Tensor& entropy,
                                     const Tensor& stats, const Tensor& grad_logprobs,
                                     const Tensor& grad_entropy, const Tensor& grad_logsumexp) {
  gradient_into(logits, false, logits, tokens, temperature, row_temperature, mask, entropy, stats,
                grad_logprobs, grad_entropy, grad_logsumexp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
  m.impl("token_logprobs_backward_inplace", TORCH_BOX(&token_logprobs_backward_inplace));
}

}  // namespace pyllmtune
