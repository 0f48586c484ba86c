// types: element types of the CUDA kernels, the stream to launch on, the checks that come before a
// pointer is taken.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <type_traits>

namespace pyllmtune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// f(T()) with the element type of a floating dtype.
template <class Function>
void with_element_type(ScalarType dtype, const Function& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(__nv_bfloat16());
    case ScalarType::Half:
      return f(__half());
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

template <class T>
T* data(const Tensor& x) {
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(x.const_data_ptr());
  else
    return static_cast<T*>(x.mutable_data_ptr());
}

// The device of one call: current while this lives; its tensors are checked against it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& first) : index_(cuda_index(first)), guard_(index_) {}

  template <class T>
  T* flat(const Tensor& x, int64_t numel, ScalarType dtype, const char* name) const {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == index_, name,
                    " must be on cuda:", index_);
    STD_TORCH_CHECK(x.is_contiguous() && x.numel() == numel && x.scalar_type() == dtype, name,
                    " must be contiguous, of ", numel, " elements and the expected dtype");
    return data<T>(x);
  }
  template <class T>
  T* flat(const std::optional<Tensor>& x, int64_t numel, ScalarType dtype, const char* name) const {
    return x ? flat<T>(*x, numel, dtype, name) : nullptr;
  }

  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  static torch::stable::accelerator::DeviceIndex cuda_index(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "expected tensors on a CUDA device");
    return x.get_device_index();
  }

  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace pyllmtune
