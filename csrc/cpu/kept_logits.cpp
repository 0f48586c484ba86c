// kept_logits: logits of kept tokens alone, straight from hidden states: a dot product for each.
//
//   hidden [rows, D], weight [V, D], offsets [rows + 1], token_ids [entries] -> logits [entries]
//   logits_e = <hidden_row(e), weight_id(e)>
//   dhidden_i = sum over row i of g_e weight_id(e);  dweight_v = sum over id v of g_e hidden_row(e)
//
//   Moves a row of D of the weight for each entry, and in backward again; dweight is fresh memory,
//   which is zero, where it is large, and of it the rows of kept ids are written.
//   bfloat16 and float16 operands are multiplied in float32, exactly; sums are float32 (float64 for
//   float64), rounded once, in the order of entries, so their bits depend on nothing else. Entries
//   whose gradient is 0 are not read: a row that was masked may hold NaN.
//   Limits: an id that occurs in every row is work for one thread in dweight.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "kept_sets.h"
#include "memory.h"
#include "rows.h"
#include "simd.h"
#include "types.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

// The inner loops below, D long, are four vectors wide: one fused multiply-add waits for four.
template <class V, class T>
typename V::Scalar dot(const typename V::Scalar* a, const T* b, int64_t n) {
  using F = typename V::Scalar;
  V sum[4] = {V(F(0)), V(F(0)), V(F(0)), V(F(0))};
  int64_t i = 0;
  for (; i + 4 * V::kWidth <= n; i += 4 * V::kWidth)
    for (int k = 0; k < 4; ++k)
      sum[k] = fma_of(load(a + i + k * V::kWidth), load(b + i + k * V::kWidth), sum[k]);
  for (; i + V::kWidth <= n; i += V::kWidth) sum[0] = fma_of(load(a + i), load(b + i), sum[0]);
  if (i < n)
    sum[1] = fma_of(load_first(a + i, n - i, F(0)), load_first(b + i, n - i, F(0)), sum[1]);
  return reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// sum += factor x
template <class V, class T>
void add_scaled(typename V::Scalar* sum, typename V::Scalar factor, const T* x, int64_t n) {
  using F = typename V::Scalar;
  const V scale(factor);
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth)
    store(sum + i, fma_of(scale, load(x + i), load(sum + i)));
  if (i < n)
    store_first(sum + i,
                fma_of(scale, load_first(x + i, n - i, F(0)), load_first(sum + i, n - i, F(0))),
                n - i);
}

template <class V, class From, class To>
void convert(const From* x, To* out, int64_t n) {
  using F = typename V::Scalar;
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) store(out + i, load(x + i));
  if (i < n) store_first(out + i, load_first(x + i, n - i, F(0)), n - i);
}

// Lines of the next row of the weight, whose place no prefetcher can guess.
template <class T>
void prefetch_row(const T* p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += kLine) prefetch(p + i);
}

template <class T>
void forward(const T* hidden, const T* weight, int64_t size, const KeptSets& kept, const bool* mask,
             scalar_of<T>* logits) {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;
  parallel_for(kept.rows, kept.grain(size), [&](int64_t begin, int64_t end) {
    std::vector<F> wide(size);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t last = kept.offsets[row + 1];
      int64_t entry = kept.offsets[row];
      if (mask != nullptr && !mask[row]) {
        std::fill(logits + entry, logits + last, F(0));
        continue;
      }
      convert<V>(hidden + row * size, wide.data(), size);
      for (; entry < last; ++entry) {
        if (entry + 1 < last) prefetch_row(weight + kept.ids[entry + 1] * size, size);
        logits[entry] = dot<V>(wide.data(), weight + kept.ids[entry] * size, size);
      }
    }
  });
}

template <class T>
void backward_hidden(const scalar_of<T>* grad, const T* weight, int64_t size, const KeptSets& kept,
                     T* out) {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;
  parallel_for(kept.rows, kept.grain(size), [&](int64_t begin, int64_t end) {
    std::vector<F> sum(size);
    for (int64_t row = begin; row < end; ++row) {
      std::fill(sum.begin(), sum.end(), F(0));
      for (int64_t entry = kept.offsets[row]; entry < kept.offsets[row + 1]; ++entry) {
        if (grad[entry] == F(0)) continue;
        if (entry + 1 < kept.offsets[row + 1])
          prefetch_row(weight + kept.ids[entry + 1] * size, size);
        add_scaled<V>(sum.data(), grad[entry], weight + kept.ids[entry] * size, size);
      }
      convert<V>(sum.data(), out + row * size, size);
    }
  });
}

// Entries by token: grad, rows and ids [entries], ids ascending. `out` holds zeros.
template <class T>
void backward_weight(const scalar_of<T>* grad, const int64_t* rows, const int32_t* ids,
                     int64_t entries, const T* hidden, int64_t size, T* out) {
  using V = typename VectorOf<T>::type;
  using F = scalar_of<T>;
  parallel_for(entries, std::max<int64_t>(1, kStripe / size), [&](int64_t begin, int64_t end) {
    std::vector<F> sum(size);
    for (int64_t first = begin; first < end; ++first) {
      if (first > 0 && ids[first - 1] == ids[first]) continue;  // done with the first of this id
      bool any = false;
      for (int64_t entry = first; entry < entries && ids[entry] == ids[first]; ++entry) {
        if (grad[entry] == F(0)) continue;
        if (!any) std::fill(sum.begin(), sum.end(), F(0));
        any = true;
        add_scaled<V>(sum.data(), grad[entry], hidden + rows[entry] * size, size);
      }
      if (any) convert<V>(sum.data(), out + ids[first] * size, size);
    }
  });
}

template <class F>
const F* flat(const Tensor& x, int64_t numel, const char* name) {
  check_flat(x, numel, kScalarType<F>, name);
  return data<const F>(x);
}

void check_matrix(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.is_contiguous() && x.size(1) > 0, name,
                  " must be a contiguous [n, D] on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && x.size(1) == like.size(1),
                  "hidden and weight must have one dtype and D");
}

Tensor kept_logits(const Tensor& hidden, const Tensor& weight, const Tensor& offsets,
                   const Tensor& token_ids, std::optional<Tensor> mask) {
  check_matrix(hidden, weight, "hidden");
  check_matrix(weight, hidden, "weight");
  const KeptSets kept = check_kept(offsets, token_ids, hidden.size(0), weight.size(0));
  if (mask) check_flat(*mask, kept.rows, ScalarType::Bool, "mask");
  const auto dtype =
      hidden.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor logits = torch::stable::new_empty(hidden, {kept.entries}, dtype);
  if (kept.entries > 0)
    with_element_type(hidden.scalar_type(), [&](auto element) {
      using T = decltype(element);
      forward(data<const T>(hidden), data<const T>(weight), hidden.size(1), kept,
              mask ? data<const bool>(*mask) : nullptr, data<scalar_of<T>>(logits));
    });
  return logits;
}

Tensor kept_logits_backward_hidden(const Tensor& grad, const Tensor& weight, const Tensor& offsets,
                                   const Tensor& token_ids) {
  check_matrix(weight, weight, "weight");
  const KeptSets kept = check_kept(offsets, token_ids, offsets.numel() - 1, weight.size(0));
  Tensor out = torch::stable::new_empty(weight, {kept.rows, weight.size(1)});
  if (kept.rows > 0)
    with_element_type(weight.scalar_type(), [&](auto element) {
      using T = decltype(element);
      backward_hidden(flat<scalar_of<T>>(grad, kept.entries, "grad"), data<const T>(weight),
                      weight.size(1), kept, data<T>(out));
    });
  return out;
}

Tensor kept_logits_backward_weight(const Tensor& grad, const Tensor& rows, const Tensor& token_ids,
                                   const Tensor& hidden, const Tensor& weight) {
  check_matrix(hidden, weight, "hidden");
  check_matrix(weight, hidden, "weight");
  const int64_t entries = token_ids.numel();
  check_flat(rows, entries, ScalarType::Long, "rows");
  check_flat(token_ids, entries, ScalarType::Int, "token_ids");
  const auto* row = data<const int64_t>(rows);
  const auto* id = data<const int32_t>(token_ids);
  for (int64_t i = 0; i < entries; ++i)
    STD_TORCH_CHECK(row[i] >= 0 && row[i] < hidden.size(0) && id[i] < weight.size(0) &&
                        id[i] >= (i == 0 ? 0 : id[i - 1]),
                    "rows and token_ids must lead inside, and token_ids must not fall");
  const FreshTensor out = fresh_like(weight, Touched::kLittle);
  with_element_type(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (!out.is_zero) memset(data<T>(out.tensor), 0, weight.numel() * sizeof(T));
    if (entries > 0)
      backward_weight(flat<scalar_of<T>>(grad, entries, "grad"), row, id, entries,
                      data<const T>(hidden), hidden.size(1), data<T>(out.tensor));
  });
  return out.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) {
  m.impl("kept_logits", TORCH_BOX(&kept_logits));
  m.impl("kept_logits_backward_hidden", TORCH_BOX(&kept_logits_backward_hidden));
  m.impl("kept_logits_backward_weight", TORCH_BOX(&kept_logits_backward_weight));
}

}  // namespace pyllmtune
