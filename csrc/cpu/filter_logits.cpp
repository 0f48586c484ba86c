// filter_logits: logits / T for the tokens that temperature, top-k, top-p and min-p keep, -inf for
// the others; and the gradient of that gate.
//
//   logits [outer, inner, V] -> out [outer, inner, V], contiguous or given
//   Reads V and writes V elements a row: that is the floor. The search for the kept set
//   (row_filter.h) works on the row in the cache.
//   Backward: grad / T where out > -inf, else 0; reads 2 V, writes V.
#include <torch/csrc/stable/library.h>

#include "filter_arguments.h"
#include "memory.h"
#include "rows.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
constexpr bool kIsDouble = std::is_same_v<T, double>;

// What the filter compares: the logits, or their float32 values if they are float64.
template <class T>
using Compared = std::conditional_t<kIsDouble<T>, float, T>;

template <class T>
void fill(T* out, int64_t n, scalar_of<T> value) {
  using V = typename VectorOf<T>::type;
  const V vector(value);
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) store(out + i, vector);
  if (i < n) store_first(out + i, vector, n - i);
}

// 1 / T; 0 for a greedy row, whose one kept token becomes 0.
template <class F>
F inverse_of(double temperature, const PerRow<float>& per_row, int64_t row) {
  if (is_greedy(per_row[row])) return F(0);
  return F(1) / (per_row.is_scalar() ? static_cast<F>(temperature) : F(per_row[row]));
}

// Row z to `out`, which may be z.
template <class T>
void write_row(const T* z, const RowFilter<Compared<T>>& filter, const Compared<T>* compared,
               scalar_of<T> inverse, int64_t vocab, T* out) {
  using F = scalar_of<T>;
  const F none = -std::numeric_limits<F>::infinity();
  if (filter.in_list) {
    std::vector<F> kept;  // read before the row is overwritten
    for (const Candidate& x : filter.list) kept.push_back(to_scalar(z[x.id]) * inverse);
    fill(out, vocab, none);
    for (size_t i = 0; i < kept.size(); ++i) from_scalar(kept[i], out + filter.list[i].id);
    return;
  }
  const Cut cut = filter.cut;
  for (int64_t i = 0; i < vocab; i += 16) {
    const int64_t n = std::min<int64_t>(16, vocab - i);
    const F32x16 x = load_up_to<F32x16>(compared + i, n, kNone);
    const Mask16 ties = first_lanes(lanes_of(cut.id - i + 1));
    const Mask16 kept = (x > F32x16(cut.z)) | ((x == F32x16(cut.z)) & ties);
    if constexpr (kIsDouble<T>) {
      const uint32_t bits = bits_of(kept);
      for (int64_t k = 0; k < n; ++k) out[i + k] = bits >> k & 1 ? z[i + k] * inverse : none;
    } else {
      store_up_to(out + i, select(kept, x * F32x16(inverse), F32x16(none)), n);
    }
  }
}

template <class T>
void forward(const T* logits, RowLayout layout, const FilterArguments& arguments, int64_t rows,
             int64_t vocab, double temperature, T* out, RowLayout out_layout) {
  using F = scalar_of<T>;
  for_rows(rows, vocab, [&](int64_t first, int64_t last) {
    RowFilter<Compared<T>> filter;
    std::vector<float> copy(kIsDouble<T> ? vocab : 0);
    for (int64_t row = first; row < last; ++row) {
      const T* z = logits + layout.offset(row);
      T* to = out + out_layout.offset(row);
      const Compared<T>* compared = reinterpret_cast<const Compared<T>*>(z);
      if constexpr (kIsDouble<T>) {
        for (int64_t i = 0; i < vocab; ++i) copy[i] = static_cast<float>(z[i]);
        compared = copy.data();
      }
      filter.find(compared, vocab, arguments[row]);
      if (filter.valid)
        write_row(z, filter, compared, inverse_of<F>(temperature, arguments.temperature, row),
                  vocab, to);
      else
        fill(to, vocab,
             filter.sound() ? -std::numeric_limits<F>::infinity()
                            : std::numeric_limits<F>::quiet_NaN());
    }
  });
}

void filter_into(const Tensor& logits, double temperature, const OptionalTensor& row_temperature,
                 int64_t top_k, const OptionalTensor& row_top_k, double top_p,
                 const OptionalTensor& row_top_p, double min_p, const OptionalTensor& row_min_p,
                 int64_t order, const Tensor& out) {
  check_logits(logits);
  STD_TORCH_CHECK(out.dim() == 3 && out.scalar_type() == logits.scalar_type(),
                  "out must be [outer, inner, V] with the dtype of logits");
  for (int64_t axis = 0; axis < 3; ++axis)
    STD_TORCH_CHECK(out.size(axis) == logits.size(axis), "out must have the shape of logits");
  const int64_t rows = logits.size(0) * logits.size(1), vocab = logits.size(2);
  STD_TORCH_CHECK(vocab == 1 || out.stride(2) == 1, "out must be contiguous along V");
  const FilterArguments arguments =
      filter_arguments(rows, temperature, row_temperature, top_k, row_top_k, top_p, row_top_p,
                       min_p, row_min_p, order);
  if (rows == 0) return;
  with_element_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    forward(data<const T>(logits), row_layout(logits), arguments, rows, vocab, temperature,
            data<T>(out), row_layout(out));
  });
}

Tensor filter_logits(const Tensor& logits, double temperature, OptionalTensor row_temperature,
                     int64_t top_k, OptionalTensor row_top_k, double top_p,
                     OptionalTensor row_top_p, double min_p, OptionalTensor row_min_p,
                     int64_t order) {
  check_logits(logits);
  const Tensor out = fresh_like(logits).tensor;
  filter_into(logits, temperature, row_temperature, top_k, row_top_k, top_p, row_top_p, min_p,
              row_min_p, order, out);
  return out;
}

void filter_logits_out(const Tensor& logits, double temperature, OptionalTensor row_temperature,
                       int64_t top_k, OptionalTensor row_top_k, double top_p,
                       OptionalTensor row_top_p, double min_p, OptionalTensor row_min_p,
                       int64_t order, const Tensor& out) {
  filter_into(logits, temperature, row_temperature, top_k, row_top_k, top_p, row_top_p, min_p,
              row_min_p, order, out);
}

Tensor filter_logits_backward(const Tensor& grad, const Tensor& output, double temperature,
                              OptionalTensor row_temperature) {
  check_logits(output);
  const int64_t rows = output.size(0) * output.size(1), vocab = output.size(2);
  check_flat(grad, rows * vocab, output.scalar_type(), "grad");
  check_flat(output, rows * vocab, output.scalar_type(), "output");
  const PerRow<float> temperatures(static_cast<float>(temperature), row_temperature, rows,
                                   ScalarType::Float, "row_temperature");
  const Tensor out = fresh_like(output).tensor;
  with_element_type(output.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using V = typename VectorOf<T>::type;
    using F = scalar_of<T>;
    const T *g = data<const T>(grad), *kept = data<const T>(output);
    T* dz = data<T>(out);
    const F none = -std::numeric_limits<F>::infinity();
    for_each_stripe(rows, vocab, [&](int64_t row, int64_t, int64_t first, int64_t length) {
      const F inverse = inverse_of<F>(temperature, temperatures, row);
      const int64_t begin = row * vocab + first;
      for (int64_t i = begin; i < begin + length; i += V::kWidth) {
        const int64_t n = begin + length - i;
        const V value = load_up_to<V>(kept + i, n, none);
        V scaled(F(0));  // of a greedy row, whatever its upstream gradient holds
        if (inverse != F(0)) scaled = load_up_to<V>(g + i, n, F(0)) * V(inverse);
        // a row of NaN has a gradient of NaN
        const V gated = select(value > V(none), scaled, select(value == V(none), V(F(0)), value));
        store_up_to(dz + i, gated, n);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) {
  m.impl("filter_logits", TORCH_BOX(&filter_logits));
  m.impl("filter_logits_out", TORCH_BOX(&filter_logits_out));
  m.impl("filter_logits_backward", TORCH_BOX(&filter_logits_backward));
}

}  // namespace pyllmtune
