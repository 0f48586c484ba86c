// types: element types of the CPU kernels, and the checks that come before a pointer is taken.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>

#include "simd.h"

namespace pyllmtune {

using torch::headeronly::ScalarType;

// What elements of type T are computed in, and what per-token results are stored in.
template <class T>
using scalar_of = typename VectorOf<T>::type::Scalar;

template <class F>
constexpr ScalarType kScalarType =
    std::is_same_v<F, double> ? ScalarType::Double : ScalarType::Float;

template <class T>
scalar_of<T> to_scalar(T x) {
  if constexpr (std::is_same_v<T, scalar_of<T>>)
    return x;
  else
    return reduce_max(load_first(&x, 1, -std::numeric_limits<float>::infinity()));
}
inline float to_scalar(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
void from_scalar(scalar_of<T> x, T* p) {
  if constexpr (std::is_same_v<T, scalar_of<T>>)
    *p = x;
  else
    store_first(p, F32x16(x), 1);
}

// f(T()) with the element type of a floating dtype.
template <class Function>
void with_element_type(ScalarType dtype, const Function& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(Bf16());
    case ScalarType::Half:
      return f(Fp16());
    case ScalarType::Double:
      return f(double());
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64");
  }
}

template <class T>
T* data(const torch::stable::Tensor& x) {
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(x.const_data_ptr());
  else
    return static_cast<T*>(x.mutable_data_ptr());
}

inline void check_flat(const torch::stable::Tensor& x, int64_t numel, ScalarType dtype,
                       const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.numel() == numel && x.scalar_type() == dtype,
                  name, " must be a contiguous CPU tensor of ", numel,
                  " elements and the expected dtype");
}

}  // namespace pyllmtune
