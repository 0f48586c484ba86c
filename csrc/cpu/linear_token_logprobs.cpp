// linear_token_logprobs: what is done with one tile of logits, hidden W^T, before the next tile
// takes its memory.
//
//   logits [rows, columns] float32, columns first ... of the vocabulary
//   z = softcap(scale (logits + bias)),  softcap(u) = cap tanh(u / cap)
//   Forward merges the tile into running [4, rows] = (max, sum, weighted, target logit) and writes
//   scores [3, rows] = (log-prob, entropy, logsumexp) of the columns seen so far.
//   Backward writes grad [rows, columns] = d/dlogits, in the dtype of the operands.
//   The tile was just written and is still in cache; a row of it is one stripe.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "row_gradient.h"
#include "row_stats.h"
#include "rows.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

template <class F>
struct Tile {
  const F* logits;
  int64_t rows, columns, stride, first;
  F scale, cap;
  const F* bias;  // of the first column, or null
  const int64_t* tokens;
  F temperature;
  const F* row_temperature;  // or null

  F inv_temperature(int64_t row) const {
    return F(1) / (row_temperature == nullptr ? temperature : row_temperature[row]);
  }

  bool plain() const { return bias == nullptr && scale == F(1) && cap == F(0); }

  // Where a thread keeps z of its row.
  std::vector<F> room() const { return std::vector<F>(plain() ? 0 : columns); }

  // z of a row: its logits, or made of them in `room`.
  template <class V>
  const F* processed(int64_t row, std::vector<F>& room) const {
    const F* raw = logits + row * stride;
    if (plain()) return raw;
    F* z = room.data();
    const V by(scale), inside(cap == F(0) ? F(0) : F(1) / cap), outside(cap);
    for (int64_t i = 0; i < columns; i += V::kWidth) {
      V x = load_up_to<V>(raw + i, columns - i, F(0));
      if (bias != nullptr) x = x + load_up_to<V>(bias + i, columns - i, F(0));
      x = x * by;
      if (cap != F(0)) x = tanh_of(x * inside) * outside;
      store_up_to(z + i, x, columns - i);
    }
    return z;
  }
};

template <class F>
void forward(const Tile<F>& tile, F* running, F* scores) {
  using V = typename VectorOf<F>::type;
  const int64_t n = tile.rows;
  parallel_for(n, 8, [&](int64_t begin, int64_t end) {
    std::vector<F> room = tile.room();
    for (int64_t row = begin; row < end; ++row) {
      const F* z = tile.template processed<V>(row, room);
      const F inv_temperature = tile.inv_temperature(row);
      SoftmaxStats<F> stats{running[row], running[n + row], running[2 * n + row]};
      stats =
          merge(stats, stripe_stats<V, true>(z, tile.columns, inv_temperature), inv_temperature);
      running[row] = stats.max;
      running[n + row] = stats.sum;
      running[2 * n + row] = stats.weighted;
      const int64_t token = tile.tokens[row] - tile.first;
      if (token >= 0 && token < tile.columns) running[3 * n + row] = z[token];
      const F target = running[3 * n + row];
      if (target != target) stats.sum = target;  // not seen yet; in the end: there is no such token
      const TokenScore<F> score = finish(stats, target, inv_temperature);
      scores[row] = score.logprob;
      scores[n + row] = score.entropy;
      scores[2 * n + row] = score.logsumexp;
    }
  });
}

template <class T, class F>
void backward(const Tile<F>& tile, const F* stats, const F* upstream, T* grad, int64_t stride) {
  using V = typename VectorOf<F>::type;
  const int64_t n = tile.rows;
  const V inside(tile.cap == F(0) ? F(0) : F(1) / tile.cap);
  const auto through_cap = [&](V gradient, V z) {
    const V t = z * inside;
    return gradient * (V(F(1)) - t * t);
  };
  parallel_for(n, 8, [&](int64_t begin, int64_t end) {
    std::vector<F> room = tile.room();
    for (int64_t row = begin; row < end; ++row) {
      T* out = grad + row * stride;
      const F top = stats[row], total = stats[n + row], entropy = stats[2 * n + row];
      if (top == -std::numeric_limits<F>::infinity() && total == F(0)) {  // nothing is allowed
        std::fill_n(out, tile.columns, T());
        continue;
      }
      const F* z = tile.template processed<V>(row, room);
      const F inv_temperature = tile.inv_temperature(row);
      auto by_logit = score_gradient(upstream[row], upstream[n + row], upstream[2 * n + row],
                                     entropy, inv_temperature);
      by_logit = {by_logit.constant * tile.scale, by_logit.slope * tile.scale,
                  by_logit.at_target * tile.scale};
      const F log_sum = log_of(total);
      const int64_t target = tile.tokens[row] - tile.first;
      if (tile.cap == F(0))
        stripe_gradient<V>(z, out, tile.columns, top, log_sum, inv_temperature, by_logit, target);
      else
        stripe_gradient<V>(z, out, tile.columns, top, log_sum, inv_temperature, by_logit, target,
                           through_cap);
    }
  });
}

template <class F>
Tile<F> check_tile(const Tensor& logits, int64_t first, double scale, double softcap,
                   const std::optional<Tensor>& bias, const Tensor& tokens, double temperature,
                   const std::optional<Tensor>& row_temperature) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.stride(1) == 1 &&
                      logits.scalar_type() == kScalarType<F>,
                  "logits must be [rows, columns] of float32 or float64 on the CPU");
  const int64_t rows = logits.size(0), columns = logits.size(1);
  check_flat(tokens, rows, ScalarType::Long, "tokens");
  if (bias) check_flat(*bias, columns, kScalarType<F>, "bias");
  if (row_temperature) check_flat(*row_temperature, rows, kScalarType<F>, "row_temperature");
  return {data<const F>(logits),
          rows,
          columns,
          logits.stride(0),
          first,
          F(scale),
          F(softcap),
          bias ? data<const F>(*bias) : nullptr,
          data<const int64_t>(tokens),
          F(temperature),
          row_temperature ? data<const F>(*row_temperature) : nullptr};
}

template <class Function>
void with_number(const Tensor& logits, const Function& f) {
  logits.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

void linear_token_logprobs_tile(const Tensor& logits, int64_t first, double scale, double softcap,
                                std::optional<Tensor> bias, const Tensor& tokens,
                                double temperature, std::optional<Tensor> row_temperature,
                                const Tensor& running, const Tensor& scores) {
  with_number(logits, [&](auto number) {
    using F = decltype(number);
    const auto tile =
        check_tile<F>(logits, first, scale, softcap, bias, tokens, temperature, row_temperature);
    check_flat(running, 4 * tile.rows, kScalarType<F>, "running");
    check_flat(scores, 3 * tile.rows, kScalarType<F>, "scores");
    forward(tile, data<F>(running), data<F>(scores));
  });
}

void linear_token_logprobs_tile_backward(const Tensor& logits, int64_t first, double scale,
                                         double softcap, std::optional<Tensor> bias,
                                         const Tensor& tokens, double temperature,
                                         std::optional<Tensor> row_temperature, const Tensor& stats,
                                         const Tensor& upstream, const Tensor& grad) {
  with_number(logits, [&](auto number) {
    using F = decltype(number);
    const auto tile =
        check_tile<F>(logits, first, scale, softcap, bias, tokens, temperature, row_temperature);
    check_flat(stats, 3 * tile.rows, kScalarType<F>, "stats");
    check_flat(upstream, 3 * tile.rows, kScalarType<F>, "upstream");
    STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 2 && grad.size(0) == tile.rows &&
                        grad.size(1) == tile.columns && grad.stride(1) == 1,
                    "grad must have the shape of logits");
    with_element_type(grad.scalar_type(), [&](auto element) {
      using T = decltype(element);
      if constexpr (std::is_same_v<scalar_of<T>, F>)
        backward(tile, data<const F>(stats), data<const F>(upstream), data<T>(grad),
                 grad.stride(0));
      else
        STD_TORCH_CHECK(false, "grad is float64 if and only if logits are");
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) {
  m.impl("linear_token_logprobs_tile", TORCH_BOX(&linear_token_logprobs_tile));
  m.impl("linear_token_logprobs_tile_backward", TORCH_BOX(&linear_token_logprobs_tile_backward));
}

}  // namespace pyllmtune
