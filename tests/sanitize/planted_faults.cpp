// planted_faults: operators that are wrong on purpose. Built into the sanitized CPU modules alone,
// where a test demands that each is found. They use the same pool and the same pointers as the real
// kernels.
#include <torch/csrc/stable/library.h>

#include "../../csrc/cpu/parallel.h"
#include "../../csrc/cpu/types.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

// ASan: reads one element past a tensor.
Tensor overflow(const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, {1});
  *data<float>(out) = data<const float>(x)[x.numel()];
  return out;
}

// UBSan: a shift by as many bits as the type has.
Tensor bad_shift(const Tensor& x) {
  const volatile int bits = 32 + static_cast<int>(x.numel()) * 0;
  const int shifted = 1 << bits;
  Tensor out = torch::stable::new_empty(x, {1});
  *data<float>(out) = static_cast<float>(shifted);
  return out;
}

// TSan: every worker adds to the same element.
Tensor race(const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, {1});
  float* sum = data<float>(out);
  *sum = 0;
  parallel_for(x.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) *sum += data<const float>(x)[i];
  });
  return out;
}

// Clean: every worker writes its own elements, the caller reads them afterwards.
Tensor no_race(const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, {x.numel()});
  float* y = data<float>(out);
  parallel_for(x.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y[i] = data<const float>(x)[i];
  });
  for (int64_t i = 0; i < x.numel(); ++i) y[i] += 1;
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(pyllmtune_planted, m) {
  m.def("overflow(Tensor x) -> Tensor");
  m.def("bad_shift(Tensor x) -> Tensor");
  m.def("race(Tensor x) -> Tensor");
  m.def("no_race(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyllmtune_planted, CPU, m) {
  m.impl("overflow", TORCH_BOX(&overflow));
  m.impl("bad_shift", TORCH_BOX(&bad_shift));
  m.impl("race", TORCH_BOX(&race));
  m.impl("no_race", TORCH_BOX(&no_race));
}

}  // namespace pyllmtune
