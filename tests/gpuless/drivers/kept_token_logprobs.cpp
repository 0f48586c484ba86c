// Entries for the kernels of csrc/cuda/kept_token_logprobs.cuh. dtype: 0 float32, 1 bfloat16,
// 2 float16. inner 0: the logits are flat, and vocab is not looked at.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/kept_token_logprobs.cuh"
// clang-format on

namespace {

using namespace pyllmtune;

template <class T, class Pointer>
KeptEntries<T> entries_of(Pointer* p, int64_t inner, int64_t outer_stride, int64_t inner_stride) {
  const bool flat = inner == 0;
  return {static_cast<T*>(p),
          flat,
          {static_cast<uint32_t>(flat ? 1 : inner), outer_stride, inner_stride}};
}

template <class Function>
void with_element_type(int64_t dtype, const Function& f) {
  if (dtype == 0) f(float());
  if (dtype == 1) f(__nv_bfloat16());
  if (dtype == 2) f(__half());
}

KeptRows kept_rows(int64_t rows, int64_t entries, int64_t inner, int64_t vocab,
                   const int64_t* offsets, const int32_t* ids, const int64_t* tokens,
                   double temperature, const float* row_temperature, const bool* mask) {
  return {{rows, inner == 0 ? INT32_MAX : static_cast<int>(vocab), tokens, mask, row_temperature,
           static_cast<float>(temperature)},
          {rows, entries, offsets, ids}};
}

}  // namespace

extern "C" int kept_token_logprobs(int64_t dtype, const void* logits, int64_t rows, int64_t entries,
                                   int64_t inner, int64_t vocab, int64_t outer_stride,
                                   int64_t inner_stride, const int64_t* offsets, const int32_t* ids,
                                   const int64_t* tokens, double temperature,
                                   const float* row_temperature, const bool* mask, float* logprobs,
                                   float* entropy, float* logsumexp, float* stats) {
  return emu::guarded([&] {
    with_element_type(dtype, [&](auto element) {
      using T = decltype(element);
      launch_kept_token_logprobs(entries_of<const T>(logits, inner, outer_stride, inner_stride),
                                 kept_rows(rows, entries, inner, vocab, offsets, ids, tokens,
                                           temperature, row_temperature, mask),
                                 {logprobs, entropy, logsumexp, stats, stats + rows}, nullptr);
    });
  });
}

extern "C" int kept_token_logprobs_backward(
    int64_t dtype, const void* logits, int64_t rows, int64_t entries, int64_t inner, int64_t vocab,
    int64_t outer_stride, int64_t inner_stride, const int64_t* offsets, const int32_t* ids,
    const int64_t* tokens, double temperature, const float* row_temperature, const bool* mask,
    const float* entropy, const float* stats, const float* grad_logprobs, const float* grad_entropy,
    const float* grad_logsumexp, void* grad) {
  return emu::guarded([&] {
    with_element_type(dtype, [&](auto element) {
      using T = decltype(element);
      launch_kept_token_logprobs_backward(
          entries_of<const T>(logits, inner, outer_stride, inner_stride),
          entries_of<T>(grad, inner, inner * vocab, vocab),
          kept_rows(rows, entries, inner, vocab, offsets, ids, tokens, temperature, row_temperature,
                    mask),
          {entropy, stats, stats + rows, grad_logprobs, grad_entropy, grad_logsumexp}, nullptr);
    });
  });
}
