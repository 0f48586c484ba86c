// matmul: checks and registration of matmul.h.
#include "matmul.h"

#include <torch/csrc/stable/library.h>

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

template <class T>
Operand<T> operand(const Tensor& x) {
  return {data<const T>(x), x.stride(0), x.stride(1)};
}

void matmul(const Tensor& a, const Tensor& b, bool add, const Tensor& out) {
  STD_TORCH_CHECK(a.is_cpu() && b.is_cpu() && out.is_cpu() && a.dim() == 2 && b.dim() == 2 &&
                      out.dim() == 2 && a.size(1) == b.size(0) && out.size(0) == a.size(0) &&
                      out.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                  "a [M, K], b [K, N] of one dtype and out [M, N] must be on the CPU");
  STD_TORCH_CHECK(out.size(1) <= 1 || out.stride(1) == 1, "out must have rows of unit stride");
  with_element_type(a.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using F = scalar_of<T>;
    STD_TORCH_CHECK(out.scalar_type() == kScalarType<F>, "out must be float32, or float64");
    multiply(operand<T>(a), operand<T>(b), data<F>(out), out.stride(0), a.size(0), b.size(1),
             a.size(1), add);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) { m.impl("matmul", TORCH_BOX(&matmul)); }

}  // namespace pyllmtune
