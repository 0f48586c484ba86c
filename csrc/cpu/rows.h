// rows: how a [rows, V] problem is cut into work for threads, and where a strided row lies.
//
// A row is cut into stripes of fixed length, whatever the batch and the number of threads; stripes
// are merged in order. So one row uses every core, and the bits of its result depend on nothing but
// the row.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace pyllmtune {

// 32,768: 128 KiB of float32, long enough that starting one costs under 1 % of reading it
constexpr int64_t kStripe = 32768;

struct RowLayout {
  int64_t inner;                       // rows per outer index
  int64_t outer_stride, inner_stride;  // in elements

  int64_t offset(int64_t row) const {
    return row / inner * outer_stride + row % inner * inner_stride;
  }
};

inline RowLayout row_layout(const torch::stable::Tensor& x) {  // x [outer, inner, V]
  return {std::max<int64_t>(x.size(1), 1), x.stride(0), x.stride(1)};
}

inline int64_t stripes_of(int64_t vocab) { return (vocab + kStripe - 1) / kStripe; }

// f(row, stripe, first, length) for every stripe of every row, spread over torch's threads.
template <class F>
void for_each_stripe(int64_t rows, int64_t vocab, const F& f) {
  const int64_t stripes = stripes_of(vocab);
  const int64_t grain = std::max<int64_t>(1, kStripe / std::min(vocab, kStripe));
  parallel_for(rows * stripes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t stripe = item % stripes, first = stripe * kStripe;
      f(item / stripes, stripe, first, std::min(kStripe, vocab - first));
    }
  });
}

// read(row, stripe, first, length) for all stripes of a row, and then write(row, first, length) for
// all. One thread does both where there are rows enough, and finds in its cache what it has read.
template <class Read, class Write>
void for_each_row_twice(int64_t rows, int64_t vocab, const Read& read, const Write& write) {
  // 4: no thread then has over a third more to do than another
  if (rows < 4 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    for_each_stripe(rows, vocab, read);
    for_each_stripe(rows, vocab, [&](int64_t row, int64_t, int64_t first, int64_t length) {
      write(row, first, length);
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kStripe / vocab);
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t first = 0; first < vocab; first += kStripe)
        read(row, first / kStripe, first, std::min(kStripe, vocab - first));
      for (int64_t first = 0; first < vocab; first += kStripe)
        write(row, first, std::min(kStripe, vocab - first));
    }
  });
}

}  // namespace pyllmtune
