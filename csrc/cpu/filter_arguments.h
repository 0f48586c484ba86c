// filter_arguments: the parameters of filter_logits and sample, one set a row, checked before use.
#pragma once

#include <optional>

#include "row_filter.h"
#include "types.h"

namespace pyllmtune {

// A scalar for all rows, or one value a row.
template <class F>
class PerRow {
 public:
  PerRow(F scalar, const std::optional<torch::stable::Tensor>& per_row, int64_t rows,
         ScalarType dtype, const char* name)
      : scalar_(scalar) {
    if (!per_row) return;
    check_flat(*per_row, rows, dtype, name);
    rows_ = data<const F>(*per_row);
  }
  bool is_scalar() const { return rows_ == nullptr; }
  F operator[](int64_t row) const { return rows_ == nullptr ? scalar_ : rows_[row]; }

 private:
  F scalar_;
  const F* rows_ = nullptr;
};

struct FilterArguments {
  PerRow<float> temperature;
  PerRow<int64_t> top_k;
  PerRow<double> top_p;
  PerRow<float> min_p;
  Order order;

  FilterRule operator[](int64_t row) const {
    return {temperature[row], top_k[row], top_p[row], min_p[row], order};
  }
};

inline FilterArguments filter_arguments(
    int64_t rows, double temperature, const std::optional<torch::stable::Tensor>& row_temperature,
    int64_t top_k, const std::optional<torch::stable::Tensor>& row_top_k, double top_p,
    const std::optional<torch::stable::Tensor>& row_top_p, double min_p,
    const std::optional<torch::stable::Tensor>& row_min_p, int64_t order) {
  STD_TORCH_CHECK(order >= 0 && order <= 3, "order must be 0 to 3, got ", order);
  return {{static_cast<float>(temperature), row_temperature, rows, ScalarType::Float,
           "row_temperature"},
          {top_k, row_top_k, rows, ScalarType::Long, "row_top_k"},
          {top_p, row_top_p, rows, ScalarType::Double, "row_top_p"},
          {static_cast<float>(min_p), row_min_p, rows, ScalarType::Float, "row_min_p"},
          static_cast<Order>(order)};
}

inline void check_logits(const torch::stable::Tensor& logits) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 3,
                  "logits must be [outer, inner, V] on the CPU");
  const int64_t vocab = logits.size(2);
  STD_TORCH_CHECK(vocab > 0 && (vocab == 1 || logits.stride(2) == 1),
                  "logits must be contiguous along V > 0");
  STD_TORCH_CHECK(vocab <= INT32_MAX, "logits must have fewer than 2^31 columns, got ", vocab);
}

// f(begin, end) over rows: on all threads if every one gets a row; else here, and each row is
// split.
template <class Function>
void for_rows(int64_t rows, int64_t vocab, const Function& f) {
  if (rows < static_cast<int64_t>(torch::stable::get_num_threads())) return f(int64_t(0), rows);
  parallel_for(rows, std::max<int64_t>(1, 32768 / vocab), f);  // 32,768 logits pay for a thread
}

}  // namespace pyllmtune
