// Entries for the kernels of csrc/cuda/kept_logits.cuh. dtype: 0 float32, 1 bfloat16, 2 float16.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/kept_logits.cuh"
// clang-format on

namespace {

using namespace pyllmtune;

template <class Function>
int with_element_type(int64_t dtype, const Function& f) {
  return emu::guarded([&] {
    if (dtype == 0) f(float());
    if (dtype == 1) f(__nv_bfloat16());
    if (dtype == 2) f(__half());
  });
}

Head head(int64_t vocab, int64_t size) { return {static_cast<int>(vocab), static_cast<int>(size)}; }

}  // namespace

extern "C" int kept_logits(int64_t dtype, const void* hidden, const void* weight, int64_t vocab,
                           int64_t size, int64_t rows, int64_t entries, const int64_t* offsets,
                           const int32_t* ids, const bool* mask, float* logits) {
  return with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    launch_kept_logits(static_cast<const T*>(hidden), static_cast<const T*>(weight),
                       head(vocab, size), {rows, entries, offsets, ids}, mask, logits, nullptr);
  });
}

extern "C" int kept_logits_backward_hidden(int64_t dtype, const float* grad, const void* weight,
                                           int64_t vocab, int64_t size, int64_t rows,
                                           int64_t entries, const int64_t* offsets,
                                           const int32_t* ids, void* out) {
  return with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    launch_kept_logits_backward_hidden(grad, static_cast<const T*>(weight), head(vocab, size),
                                       {rows, entries, offsets, ids}, static_cast<T*>(out),
                                       nullptr);
  });
}

extern "C" int kept_logits_backward_weight(int64_t dtype, const float* grad, const int64_t* rows,
                                           const int32_t* ids, int64_t entries, const void* hidden,
                                           int64_t vocab, int64_t size, void* out) {
  return with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    launch_kept_logits_backward_weight(grad, rows, ids, entries, static_cast<const T*>(hidden),
                                       head(vocab, size), static_cast<T*>(out), nullptr);
  });
}
