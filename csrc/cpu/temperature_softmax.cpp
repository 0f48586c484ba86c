// temperature_softmax: softmax(z / T), or its logarithm, of every row of logits; and its gradient.
//
//   logits [outer, inner, V] -> output [outer, inner, V], of their dtype or float32
//   d_j = (z_j - max z) / T,  S = sum_j e^(d_j);  p_j = e^(d_j) / S,  log p_j = d_j - log S
//   softmax: dy_j = p_j (g_j - sum g p);  log: dy_j = g_j - p_j sum g
//   dz_j = dy_j / T,  dT = -(1/T) sum_j dy_j log p_j
//
// Forward reads V elements a row from memory, again from the second-level cache where the row fits
// it, and writes V; backward reads 2V, again from the cache, and writes V. Results larger than the
// caches are written past them. A row is done by one thread, which finds it in its own cache; few
// rows are cut into stripes for all threads, in the same order of sums.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "memory.h"
#include "row_stats.h"
#include "rows.h"
#include "simd.h"
#include "types.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

template <class F>
constexpr F kNone = -std::numeric_limits<F>::infinity();

struct Rows {
  int64_t count, vocab;
  const void* temperatures;  // or null: float or double
  double temperature;

  template <class F>
  F temperature_of(int64_t row) const {
    return temperatures == nullptr ? F(temperature) : static_cast<const F*>(temperatures)[row];
  }
  // Of a greedy row 1, in place of infinity: its maximum and its NaN are what is asked for. Of the
  // least temperatures half the largest number: 0 * infinity would be NaN.
  template <class F>
  F inv_temperature(int64_t row) const {
    const F t = temperature_of<F>(row);
    return t == F(0) ? F(1) : std::min(F(1) / t, std::numeric_limits<F>::max() / 2);
  }
};

// What is known of a stripe after its first read, or of a row; `first` for greedy rows alone.
template <class F>
struct Part {
  SoftmaxStats<F> stats;
  int64_t first = 0;  // lowest column of the maximum
};

template <class V, class T>
int64_t first_of(const T* z, int64_t n, typename V::Scalar top) {
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth)
    if (count(load(z + i) == V(top)) > 0) break;
  while (i < n && to_scalar(z[i]) != top) ++i;
  return i;
}

template <class F>
Part<F> join(const Part<F>* parts, int64_t stripes, F inv_temperature) {
  Part<F> whole = parts[0];
  for (int64_t k = 1; k < stripes; ++k) {
    if (parts[k].stats.max > whole.stats.max) whole.first = parts[k].first;
    whole.stats = merge(whole.stats, parts[k].stats, inv_temperature);
  }
  return whole;
}

// out[i] = of(i, count) for the vectors of a stripe; `count` < kWidth at its ends alone. Writing
// past the cache asks for whole lines, hence a short vector up to the first boundary.
template <class V, class U, class Function>
void fill_stripe(U* out, int64_t n, bool past_cache, const Function& of) {
  constexpr uintptr_t kLine = V::kWidth * sizeof(U);
  int64_t i = 0;
  if (past_cache && V::kWidth > 1 && n > V::kWidth) {
    i = (kLine - reinterpret_cast<uintptr_t>(out) % kLine) % kLine / sizeof(U);
    if (i > 0) store_first(out, of(0, i), i);
    for (; i + V::kWidth <= n; i += V::kWidth) stream(out + i, of(i, V::kWidth));
    end_streams();
  }
  for (; i + V::kWidth <= n; i += V::kWidth) store(out + i, of(i, V::kWidth));
  if (i < n) store_first(out + i, of(i, n - i), n - i);
}

template <class T, class U>
struct Forward {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;

  const T* logits;
  U* out;
  RowLayout layout, out_layout;
  Rows rows;
  bool log, out_is_zero, past_cache;

  Part<F> read(int64_t row, int64_t first, int64_t length) const {
    const T* z = logits + layout.offset(row) + first;
    Part<F> part;
    part.stats = stripe_stats<V, false>(z, length, rows.inv_temperature<F>(row));
    if (rows.temperature_of<F>(row) == F(0))
      part.first = first + first_of<V>(z, length, part.stats.max);
    return part;
  }

  void write(int64_t row, int64_t first, int64_t length, const Part<F>& whole) const {
    const T* z = logits + layout.offset(row) + first;
    U* y = out + out_layout.offset(row) + first;
    const F top = whole.stats.max, sum = whole.stats.sum;
    const bool nothing_allowed = top == kNone<F> && sum == F(0);
    if (nothing_allowed || (rows.temperature_of<F>(row) == F(0) && sum == sum)) {
      const V rest(log ? kNone<F> : F(0));
      if (log || !out_is_zero)
        fill_stripe<V>(y, length, false, [=](int64_t, int64_t) { return rest; });
      const int64_t best = whole.first - first;
      if (!nothing_allowed && best >= 0 && best < length) from_scalar(F(log ? 0 : 1), y + best);
      return;
    }
    const F inv_temperature = rows.inv_temperature<F>(row);
    const V base(top), nats(inv_temperature), bits(inv_temperature * F(kLog2E));
    if (log) {
      const V offset(-log_of(sum));
      fill_stripe<V>(y, length, past_cache, [=](int64_t i, int64_t n) {
        return fma_of(load_up_to<V>(z + i, n, F(0)) - base, nats, offset);
      });
    } else {
      const V scale(F(1) / sum);
      fill_stripe<V>(y, length, past_cache, [=](int64_t i, int64_t n) {
        V exponent = (load_up_to<V>(z + i, n, F(0)) - base) * bits;
        return exp2_nonpositive(exponent) * scale;
      });
    }
  }
};

template <class T, class U>
void forward(const Forward<T, U>& op) {
  using F = scalar_of<T>;
  const int64_t stripes = stripes_of(op.rows.vocab);
  std::vector<Part<F>> parts(op.rows.count * stripes);
  for_each_row_twice(
      op.rows.count, op.rows.vocab,
      [&](int64_t row, int64_t stripe, int64_t first, int64_t length) {
        parts[row * stripes + stripe] = op.read(row, first, length);
      },
      [&](int64_t row, int64_t first, int64_t length) {
        op.write(row, first, length,
                 join(&parts[row * stripes], stripes, op.rows.template inv_temperature<F>(row)));
      });
}

// sum g p, or of the log-softmax sum g, over the entries that are allowed: masks select, so that a
// NaN upstream of a forbidden token stays where it is.
template <class V, class U>
typename V::Scalar stripe_dot(const U* g, const U* y, int64_t n, bool log) {
  using F = typename V::Scalar;
  const V none(log ? kNone<F> : F(0)), zero(F(0));
  F total(0);
  for (int64_t tile = 0; tile < n; tile += kTile) {  // short sums lose fewer digits
    const int64_t end = std::min(n, tile + kTile);
    V sum[2] = {zero, zero};
    auto add = [&](int k, V upstream, V output) {
      const V term = log ? upstream + (output - output) : upstream * output;  // NaN stays NaN
      sum[k] = sum[k] + select(output == none, zero, term);
    };
    int64_t i = tile;
    for (; i + 2 * V::kWidth <= end; i += 2 * V::kWidth)
      for (int k = 0; k < 2; ++k) add(k, load(g + i + k * V::kWidth), load(y + i + k * V::kWidth));
    for (; i < end; i += V::kWidth)
      add(0, load_up_to<V>(g + i, end - i, F(0)), load_up_to<V>(y + i, end - i, F(0)));
    total += reduce_sum(sum[0] + sum[1]);
  }
  return total;
}

// dz of a stripe; returns sum_j dy_j log p_j if asked to.
template <class V, bool kLog, bool kTemperature, class T, class U>
typename V::Scalar stripe_gradient(const U* g, const U* y, T* dz, int64_t n, bool past_cache,
                                   typename V::Scalar dot, typename V::Scalar inv_temperature) {
  using F = typename V::Scalar;
  const V none(kLog ? kNone<F> : F(0)), zero(F(0)), all(dot), scale(inv_temperature);
  V sum = zero;
  // where a stream begins follows from the address, and the order of the sum must not
  fill_stripe<V>(dz, n, past_cache && !kTemperature, [&](int64_t i, int64_t count) {
    const V upstream = load_up_to<V>(g + i, count, F(0)),
            output = load_up_to<V>(y + i, count, F(0));
    V dy;
    if constexpr (kLog) {
      V bits = output * V(F(kLog2E));
      dy = upstream - exp2_nonpositive(bits) * all;
    } else {
      dy = output * (upstream - all);
    }
    dy = select(output == none, zero, dy);
    if constexpr (kTemperature) {
      const V log_p = kLog ? output : log_of(output);
      // lanes behind the end have p = 1 in a log-softmax
      const auto counted = lanes_up_to<V>(count) & !(output == none);
      sum = sum + select(counted, dy * log_p, zero);
    }
    return dy * scale;
  });
  return reduce_sum(sum);
}

template <class T, class U>
struct Backward {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;

  const U *grad, *output;
  T* out;
  F* grad_temperature;  // or null
  RowLayout grad_layout, layout, out_layout;
  Rows rows;
  bool log, past_cache;

  F read(int64_t row, int64_t first, int64_t length) const {
    return stripe_dot<V>(grad + grad_layout.offset(row) + first,
                         output + layout.offset(row) + first, length, log);
  }

  // returns the stripe's part of the temperature's gradient
  F write(int64_t row, int64_t first, int64_t length, F dot) const {
    const U *g = grad + grad_layout.offset(row) + first, *y = output + layout.offset(row) + first;
    T* dz = out + out_layout.offset(row) + first;
    if (rows.temperature_of<F>(row) == F(0)) {  // an invalid row is NaN from end to end
      const V nothing(to_scalar(*y) == to_scalar(*y) ? F(0) : std::numeric_limits<F>::quiet_NaN());
      fill_stripe<V>(dz, length, false, [=](int64_t, int64_t) { return nothing; });
      return reduce_max(nothing);
    }
    const F inv = rows.inv_temperature<F>(row);
    const auto run = log ? (grad_temperature ? stripe_gradient<V, true, true, T, U>
                                             : stripe_gradient<V, true, false, T, U>)
                         : (grad_temperature ? stripe_gradient<V, false, true, T, U>
                                             : stripe_gradient<V, false, false, T, U>);
    return -inv * run(g, y, dz, length, past_cache, dot, inv);
  }
};

template <class T, class U>
void backward(const Backward<T, U>& op) {
  using F = scalar_of<T>;
  const int64_t stripes = stripes_of(op.rows.vocab);
  std::vector<F> dots(op.rows.count * stripes), temperature(op.rows.count * stripes);
  for_each_row_twice(
      op.rows.count, op.rows.vocab,
      [&](int64_t row, int64_t stripe, int64_t first, int64_t length) {
        dots[row * stripes + stripe] = op.read(row, first, length);
      },
      [&](int64_t row, int64_t first, int64_t length) {
        F dot(0);
        for (int64_t k = 0; k < stripes; ++k) dot += dots[row * stripes + k];
        temperature[row * stripes + first / kStripe] = op.write(row, first, length, dot);
      });
  if (op.grad_temperature == nullptr) return;
  for (int64_t row = 0; row < op.rows.count; ++row) {
    op.grad_temperature[row] = F(0);
    for (int64_t k = 0; k < stripes; ++k)
      op.grad_temperature[row] += temperature[row * stripes + k];
  }
}

ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Rows check_rows(const Tensor& x, const char* name, double temperature,
                const std::optional<Tensor>& per_row) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, name, " must be [outer, inner, V] on the CPU");
  const int64_t count = x.size(0) * x.size(1), vocab = x.size(2);
  STD_TORCH_CHECK(vocab > 0 && (vocab == 1 || x.stride(2) == 1), name,
                  " must be contiguous along V > 0");
  if (per_row) check_flat(*per_row, count, accumulator(x), "row_temperature");
  const Rows rows{count, vocab, per_row ? per_row->const_data_ptr() : nullptr, temperature};
  for (int64_t row = 0; row < (per_row ? count : 1); ++row) {
    const double t = accumulator(x) == ScalarType::Double ? rows.temperature_of<double>(row)
                                                          : rows.temperature_of<float>(row);
    STD_TORCH_CHECK(t >= 0.0 && t < std::numeric_limits<double>::infinity(),
                    "temperature must be at least 0 and finite, got ", t, " in row ", row);
  }
  return rows;
}

void check_same(const Tensor& x, const Tensor& like, const char* name) {
  bool same = x.is_cpu() && x.dim() == 3;
  for (int64_t axis = 0; same && axis < 3; ++axis) same = x.size(axis) == like.size(axis);
  STD_TORCH_CHECK(same && (x.size(2) == 1 || x.stride(2) == 1), name,
                  " must have the shape of the logits and be contiguous along V");
}

// f(T(), U()): U is what is stored, T or float32.
template <class Function>
void with_element_types(ScalarType dtype, ScalarType stored, const Function& f) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (stored == dtype) return f(element, element);
    STD_TORCH_CHECK(stored == ScalarType::Float && dtype != ScalarType::Double,
                    "the result must have the dtype of the logits or float32");
    if constexpr (sizeof(T) == 2) f(element, float());
  });
}

// 32 MiB, the last-level cache measured on: a smaller result is found there by whoever reads it
// next
bool is_past_cache(const Tensor& x) { return x.numel() * x.element_size() >= int64_t(1) << 25; }

void forward_into(const Tensor& out, bool out_is_zero, const Tensor& logits, const Rows& rows,
                  bool log) {
  if (rows.count == 0) return;
  with_element_types(logits.scalar_type(), out.scalar_type(), [&](auto element, auto stored) {
    using T = decltype(element);
    using U = decltype(stored);
    forward(Forward<T, U>{data<const T>(logits), data<U>(out), row_layout(logits), row_layout(out),
                          rows, log, out_is_zero, is_past_cache(out)});
  });
}

size_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

Tensor temperature_softmax(const Tensor& logits, double temperature,
                           std::optional<Tensor> row_temperature, bool log, ScalarType dtype) {
  const Rows rows = check_rows(logits, "logits", temperature, row_temperature);
  const FreshTensor out = fresh_like(logits, dtype, bytes_of(dtype));
  forward_into(out.tensor, out.is_zero, logits, rows, log);
  return out.tensor;
}

void temperature_softmax_out(const Tensor& logits, double temperature,
                             std::optional<Tensor> row_temperature, bool log, const Tensor& out) {
  const Rows rows = check_rows(logits, "logits", temperature, row_temperature);
  check_same(out, logits, "out");
  forward_into(out, false, logits, rows, log);
}

std::tuple<Tensor, Tensor> temperature_softmax_backward(const Tensor& grad, const Tensor& output,
                                                        double temperature,
                                                        std::optional<Tensor> row_temperature,
                                                        bool log, ScalarType dtype,
                                                        bool temperature_gradient) {
  const Rows rows = check_rows(output, "output", temperature, row_temperature);
  check_same(grad, output, "grad");
  STD_TORCH_CHECK(grad.scalar_type() == output.scalar_type(),
                  "grad must have the dtype of the output");
  const Tensor out = fresh_like(output, dtype, bytes_of(dtype)).tensor;
  Tensor by_temperature = torch::stable::new_empty(
      output,
      {temperature_gradient ? output.size(0) : 0, temperature_gradient ? output.size(1) : 0},
      accumulator(output));
  if (rows.count > 0)
    with_element_types(dtype, output.scalar_type(), [&](auto element, auto stored) {
      using T = decltype(element);
      using U = decltype(stored);
      backward(Backward<T, U>{data<const U>(grad), data<const U>(output), data<T>(out),
                              temperature_gradient ? data<scalar_of<T>>(by_temperature) : nullptr,
                              row_layout(grad), row_layout(output), row_layout(out), rows, log,
                              is_past_cache(out)});
    });
  return {out, by_temperature};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) {
  m.impl("temperature_softmax", TORCH_BOX(&temperature_softmax));
  m.impl("temperature_softmax_out", TORCH_BOX(&temperature_softmax_out));
  m.impl("temperature_softmax_backward", TORCH_BOX(&temperature_softmax_backward));
}

}  // namespace pyllmtune
