// kl_divergence: exact divergence of two rows of logits over the vocabulary; and its gradient.
//
//   logits, ref_logits [outer, inner, V] -> divergence [outer, inner], stats [6, outer, inner] =
//   (top, log S, ref_top, log(S'/S), KL(p || .), KL(q || .))          (csrc/math/divergence.h)
//   js_weight 0: KL(p || q);  W: (1 - W) KL(p || m) + W KL(q || m), m = (1 - W) p + W q
//   dz_j  = p_j (log(p_j/q_j) - KL) / T,  dz'_j = (q_j - p_j) / T
//   of the mixture: dz_j = (1 - W) p_j (log(p_j/m_j) - KL(p || m)) / T,  dz'_j alike with W and q
//
// Forward reads 2V elements a row, a mixture twice, the second time from the second-level cache
// where both rows fit it. Backward reads 2V and writes V for each gradient that is wanted; rows
// without upstream gradient are neither read nor, where the gradient is fresh memory, written.
// float32 arithmetic for float32, bfloat16 and float16; float64 through the same code.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../math/divergence.h"
#include "memory.h"
#include "row_stats.h"
#include "rows.h"
#include "simd.h"
#include "types.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

template <class F>
F finite_or_zero(F top) {  // -inf minus -inf would be NaN
  return top == -std::numeric_limits<F>::infinity() ? F(0) : top;
}

// A tile is read twice, for its maxima and for its sums; memory is read once.
template <class V, class T>
PairStats<typename V::Scalar> tile_pair(const T* z, const T* r, int64_t n,
                                        typename V::Scalar inv_temperature) {
  using F = typename V::Scalar;
  const F none = -std::numeric_limits<F>::infinity();
  PairStats<F> tile{tile_max<V>(z, n), tile_max<V>(r, n), {}};
  const F top = finite_or_zero(tile.top), ref_top = finite_or_zero(tile.ref_top);
  const V base(top), ref_base(ref_top);
  const LogitGap<V> gap(top, ref_top);
  const V bits(inv_temperature * F(kLog2E)), nats(inv_temperature);
  PairSums<V> sums;
  const auto add = [&](V a, V b) {
    V y = (a - base) * bits, ref_y = (b - ref_base) * bits;
    const V w = exp2_nonpositive(y), ref_w = exp2_nonpositive(ref_y);
    sums.add(w, ref_w, gap(a, b) * nats);
  };
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) {
    prefetch(z + i + kTile);
    prefetch(r + i + kTile);
    add(load(z + i), load(r + i));
  }
  if (i < n) add(load_first(z + i, n - i, none), load_first(r + i, n - i, none));
  tile.sums = {reduce_sum(sums.sum), reduce_sum(sums.ref_sum), reduce_sum(sums.moment),
               reduce_sum(sums.residual), F(0) - reduce_max(V(F(0)) - sums.lowest)};
  return tile;
}

template <class V, class T>
PairStats<typename V::Scalar> stripe_pair(const T* z, const T* r, int64_t n,
                                          typename V::Scalar inv_temperature) {
  PairStats<typename V::Scalar> stats;
  for (int64_t i = 0; i < n; i += kTile)
    stats = merge(stats, tile_pair<V>(z + i, r + i, std::min(kTile, n - i), inv_temperature),
                  inv_temperature);
  return stats;
}

template <class V>
V exp2_of(V y) {
  return exp2_nonpositive(y);
}

template <class V>
Mixed<V> mixed(const RowLogs<V>& row, V z, V r, typename V::Scalar weight) {
  return Mixed<V>(row, z, r, V(weight), [](V y) { return exp2_of(y); });
}

template <class F>
struct Sides {
  F p = F(0), q = F(0);  // KL(p || m), KL(q || m)
};

template <class V, class T>
Sides<typename V::Scalar> stripe_mixture(const T* z, const T* r, int64_t n, const RowLogs<V>& row,
                                         typename V::Scalar weight) {
  using F = typename V::Scalar;
  const F none = -std::numeric_limits<F>::infinity();
  Sides<F> total;
  for (int64_t tile = 0; tile < n; tile += kTile) {  // short sums lose fewer digits
    V p(F(0)), q(F(0));
    const int64_t end = std::min(n, tile + kTile);
    for (int64_t i = tile; i < end; i += V::kWidth) {
      const Mixed<V> token = mixed(row, load_up_to<V>(z + i, end - i, none),
                                   load_up_to<V>(r + i, end - i, none), weight);
      p = p + token.p_term;
      q = q + token.q_term;
    }
    total.p += reduce_sum(p);
    total.q += reduce_sum(q);
  }
  return total;
}

struct Rows {
  int64_t count, vocab;
  RowLayout layout, ref_layout;
  const bool* mask;          // or null
  const void* temperatures;  // or null: float or double
  double temperature, weight;

  bool selected(int64_t row) const { return mask == nullptr || mask[row]; }
  template <class F>
  F inv_temperature(int64_t row) const {
    return F(1) /
           (temperatures == nullptr ? F(temperature) : static_cast<const F*>(temperatures)[row]);
  }
};

template <class F>
struct RowStats {
  F* at;
  int64_t rows;

  void store(int64_t row, const PairRow<F>& pair, Sides<F> sides) const {
    const F values[6] = {pair.top, pair.log_sum, pair.ref_top, pair.log_ratio, sides.p, sides.q};
    for (int k = 0; k < 6; ++k) at[k * rows + row] = values[k];
  }
};

template <class F>
PairRow<F> load_row(const F* stats, int64_t rows, int64_t row) {
  const auto at = [=](int k) { return stats[k * rows + row]; };
  return {at(0), at(1), at(2), at(3), at(4)};
}

template <class T>
void forward(const T* logits, const T* ref_logits, const Rows& rows, scalar_of<T>* divergence,
             RowStats<scalar_of<T>> stats) {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;
  const int64_t stripes = stripes_of(rows.vocab);
  const bool mixture = rows.weight != 0.0;
  const F weight = F(rows.weight);
  std::vector<PairStats<F>> parts(rows.count * stripes);
  std::vector<Sides<F>> sides(mixture ? rows.count * stripes : 0);
  const auto whole = [&](int64_t row) {
    PairStats<F> all = parts[row * stripes];
    for (int64_t k = 1; k < stripes; ++k)
      all = merge(all, parts[row * stripes + k], rows.inv_temperature<F>(row));
    return finish(all, mixture);
  };
  const auto read = [&](int64_t row, int64_t stripe, int64_t first, int64_t length) {
    if (!rows.selected(row)) return;
    parts[row * stripes + stripe] = stripe_pair<V>(logits + rows.layout.offset(row) + first,
                                                   ref_logits + rows.ref_layout.offset(row) + first,
                                                   length, rows.inv_temperature<F>(row));
  };
  const auto read_again = [&](int64_t row, int64_t first, int64_t length) {
    if (!rows.selected(row)) return;
    const PairRow<F> pair = whole(row);
    if (!pair.is_open()) return;
    sides[row * stripes + first / kStripe] = stripe_mixture<V>(
        logits + rows.layout.offset(row) + first, ref_logits + rows.ref_layout.offset(row) + first,
        length, RowLogs<V>(pair, rows.inv_temperature<F>(row)), weight);
  };
  if (mixture)
    for_each_row_twice(rows.count, rows.vocab, read, read_again);
  else
    for_each_stripe(rows.count, rows.vocab, read);
  for (int64_t row = 0; row < rows.count; ++row) {
    if (!rows.selected(row)) {
      divergence[row] = F(0);
      stats.store(row, {F(0), F(0), F(0), F(0), F(0)}, {});
      continue;
    }
    const PairRow<F> pair = whole(row);
    Sides<F> both{pair.divergence, F(0)};
    if (mixture && pair.is_open()) {
      both = {};
      for (int64_t k = 0; k < stripes; ++k) {
        both.p += sides[row * stripes + k].p;
        both.q += sides[row * stripes + k].q;
      }
    }
    divergence[row] = mixture ? (F(1) - weight) * both.p + weight * both.q : both.p;
    stats.store(row, pair, both);
  }
}

// dz and dz' of one stripe, either of them null if it is not wanted.
template <class V, class T>
void stripe_gradient(const T* z, const T* r, T* dz, T* dr, int64_t n, const RowLogs<V>& row,
                     Sides<typename V::Scalar> sides, typename V::Scalar weight,
                     typename V::Scalar upstream) {
  using F = typename V::Scalar;
  const V zero(F(0)), scale(upstream), p_side(sides.p), q_side(sides.q);
  const auto plain = [&](int64_t i, int64_t count, V a, V b) {
    const V p = exp2_of(row.log2_p(a)), d = row.d(a, b);
    if (dz != nullptr) store_up_to(dz + i, kl_gradient(p, d, p_side) * scale, count);
    if (dr == nullptr) return;
    store_up_to(dr + i, kl_ref_gradient(p, exp2_of(row.log2_q(b)), d) * scale, count);
  };
  const V p_scale = V(F(1) - weight) * scale, q_scale = V(weight) * scale;
  const auto mixture = [&](int64_t i, int64_t count, V a, V b) {
    const Mixed<V> token = mixed(row, a, b, weight);
    if (dz != nullptr)
      store_up_to(dz + i, token.p * (zero - token.log_m_p - p_side) * p_scale, count);
    if (dr != nullptr)
      store_up_to(dr + i, token.q * (zero - token.log_m_q - q_side) * q_scale, count);
  };
  const auto all = [&](const auto& one_vector) {
    for (int64_t i = 0; i < n; i += V::kWidth)
      one_vector(i, n - i, load_up_to<V>(z + i, n - i, F(0)), load_up_to<V>(r + i, n - i, F(0)));
  };
  weight == F(0) ? all(plain) : all(mixture);
}

template <class T>
struct Gradient {
  T* at;  // or null
  RowLayout layout;
  bool is_zero;
};

template <class T>
void backward(const T* logits, const T* ref_logits, const Rows& rows, const scalar_of<T>* stats,
              const scalar_of<T>* grad, Gradient<T> dz, Gradient<T> dr) {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;
  for_each_stripe(rows.count, rows.vocab, [&](int64_t row, int64_t, int64_t first, int64_t length) {
    const auto part = [&](const Gradient<T>& out) {
      return out.at == nullptr ? nullptr : out.at + out.layout.offset(row) + first;
    };
    const PairRow<F> pair = load_row(stats, rows.count, row);
    if (!rows.selected(row) || grad[row] == F(0) || !pair.is_open()) {
      for (const Gradient<T>* out : {&dz, &dr})
        if (out->at != nullptr && !out->is_zero) memset(part(*out), 0, length * sizeof(T));
      return;
    }
    const F inv_temperature = rows.inv_temperature<F>(row);
    stripe_gradient<V>(logits + rows.layout.offset(row) + first,
                       ref_logits + rows.ref_layout.offset(row) + first, part(dz), part(dr), length,
                       RowLogs<V>(pair, inv_temperature),
                       {stats[4 * rows.count + row], stats[5 * rows.count + row]}, F(rows.weight),
                       grad[row] * inv_temperature);
  });
}

ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Rows check_rows(const Tensor& logits, const Tensor& ref_logits, double temperature,
                const std::optional<Tensor>& per_row, const std::optional<Tensor>& mask,
                double js_weight) {
  for (const Tensor* x : {&logits, &ref_logits}) {
    STD_TORCH_CHECK(x->is_cpu() && x->dim() == 3, "logits must be [outer, inner, V] on the CPU");
    STD_TORCH_CHECK(x->size(2) > 0 && (x->size(2) == 1 || x->stride(2) == 1),
                    "logits must be contiguous along V > 0");
    STD_TORCH_CHECK(x->scalar_type() == logits.scalar_type() && x->size(0) == logits.size(0) &&
                        x->size(1) == logits.size(1) && x->size(2) == logits.size(2),
                    "ref_logits must have the dtype and the shape of logits");
  }
  STD_TORCH_CHECK(js_weight >= 0.0 && js_weight < 1.0, "js_weight must be in [0, 1), got ",
                  js_weight);
  const int64_t count = logits.size(0) * logits.size(1);
  if (per_row) check_flat(*per_row, count, accumulator(logits), "row_temperature");
  if (mask) check_flat(*mask, count, ScalarType::Bool, "mask");
  const Rows rows{count,
                  logits.size(2),
                  row_layout(logits),
                  row_layout(ref_logits),
                  mask ? data<const bool>(*mask) : nullptr,
                  per_row ? per_row->const_data_ptr() : nullptr,
                  temperature,
                  js_weight};
  for (int64_t row = 0; row < count; ++row) {
    if (!rows.selected(row)) continue;
    const double t = accumulator(logits) == ScalarType::Double
                         ? 1.0 / rows.inv_temperature<double>(row)
                         : 1.0 / rows.inv_temperature<float>(row);
    STD_TORCH_CHECK(t > 0.0 && t < std::numeric_limits<double>::infinity(),
                    "temperature must be positive, got ", t, " in row ", row);
  }
  return rows;
}

std::tuple<Tensor, Tensor> kl_divergence(const Tensor& logits, const Tensor& ref_logits,
                                         double temperature, std::optional<Tensor> row_temperature,
                                         std::optional<Tensor> mask, double js_weight) {
  const Rows rows = check_rows(logits, ref_logits, temperature, row_temperature, mask, js_weight);
  const int64_t outer = logits.size(0), inner = logits.size(1);
  const ScalarType dtype = accumulator(logits);
  Tensor divergence = torch::stable::new_empty(logits, {outer, inner}, dtype);
  Tensor stats = torch::stable::new_empty(logits, {6, outer, inner}, dtype);
  if (rows.count > 0)
    with_element_type(logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using F = scalar_of<T>;
      forward(data<const T>(logits), data<const T>(ref_logits), rows, data<F>(divergence),
              RowStats<F>{data<F>(stats), rows.count});
    });
  return {divergence, stats};
}

std::tuple<Tensor, Tensor> kl_divergence_backward(const Tensor& logits, const Tensor& ref_logits,
                                                  double temperature,
                                                  std::optional<Tensor> row_temperature,
                                                  std::optional<Tensor> mask, double js_weight,
                                                  const Tensor& stats, const Tensor& grad,
                                                  bool logits_gradient, bool ref_gradient) {
  const Rows rows = check_rows(logits, ref_logits, temperature, row_temperature, mask, js_weight);
  const ScalarType dtype = accumulator(logits);
  check_flat(stats, 6 * rows.count, dtype, "stats");
  check_flat(grad, rows.count, dtype, "grad");
  const auto result = [&](bool wanted) {
    if (wanted) return fresh_like(logits);
    return FreshTensor{torch::stable::new_empty(logits, {0, 0, 0}), false};
  };
  const FreshTensor dz = result(logits_gradient), dr = result(ref_gradient);
  if (rows.count > 0)
    with_element_type(logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using F = scalar_of<T>;
      const auto gradient = [&](const FreshTensor& x, bool wanted) {
        return Gradient<T>{wanted ? data<T>(x.tensor) : nullptr, row_layout(x.tensor), x.is_zero};
      };
      backward(data<const T>(logits), data<const T>(ref_logits), rows, data<const F>(stats),
               data<const F>(grad), gradient(dz, logits_gradient), gradient(dr, ref_gradient));
    });
  return {dz.tensor, dr.tensor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) {
  m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
  m.impl("kl_divergence_backward", TORCH_BOX(&kl_divergence_backward));
}

}  // namespace pyllmtune
