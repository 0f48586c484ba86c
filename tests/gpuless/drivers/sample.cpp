// Entries for the kernels of csrc/cuda/sample.cuh. dtype: 0 float32, 1 bfloat16, 2 float16.
// clang-format off: what runs kernels comes before the kernels
#include "cuda_on_cpu.h"
#include "cuda/sample.cuh"
// clang-format on

namespace {

using namespace pyllmtune;

// f(input) for the element type; the input's other members are the same for all.
template <class Function>
void with_input(int64_t dtype, const void* logits, const SampleInput<float>& in,
                const Function& f) {
  const auto call = [&](auto element) {
    using T = decltype(element);
    f(SampleInput<T>{static_cast<const T*>(logits), in.layout, in.logits_rows, in.vocab, in.allowed,
                     in.row_indices, in.rules, in.seed, in.position, in.samples});
  };
  if (dtype == 0) call(float());
  if (dtype == 1) call(__nv_bfloat16());
  if (dtype == 2) call(__half());
}

SampleInput<float> input(int64_t logits_rows, int64_t inner, int64_t vocab, int64_t outer_stride,
                         int64_t inner_stride, const bool* flags, const uint32_t* bits,
                         int64_t allowed_per_row, const int64_t* row_indices) {
  SampleInput<float> in{};
  in.layout = {static_cast<uint32_t>(inner > 0 ? inner : 1), outer_stride, inner_stride};
  in.logits_rows = logits_rows;
  in.vocab = static_cast<int>(vocab);
  in.allowed = {flags, bits, allowed_per_row != 0};
  in.row_indices = row_indices;
  return in;
}

}  // namespace

extern "C" int sample(int64_t dtype, const void* logits, int64_t logits_rows, int64_t inner,
                      int64_t vocab, int64_t outer_stride, int64_t inner_stride, const bool* flags,
                      const uint32_t* bits, int64_t allowed_per_row, const int64_t* row_indices,
                      int64_t rows, double temperature, const float* row_temperature, int64_t top_k,
                      const int64_t* row_top_k, double top_p, const double* row_top_p, double min_p,
                      const float* row_min_p, int64_t order, int64_t samples, int64_t seed,
                      const int64_t* row_seed, int64_t position, const int64_t* row_position,
                      int64_t* tokens, bool* valid, float* logprobs, int64_t* rank,
                      int64_t* num_kept, float* kept_mass, float* entropy, int32_t* cuts) {
  return emu::guarded([&] {
    auto common = input(logits_rows, inner, vocab, outer_stride, inner_stride, flags, bits,
                        allowed_per_row, row_indices);
    common.rules = {{static_cast<float>(temperature), row_temperature},
                    {top_k, row_top_k},
                    {top_p, row_top_p},
                    {static_cast<float>(min_p), row_min_p},
                    static_cast<int>(order)};
    common.seed = {seed, row_seed};
    common.position = {position, row_position};
    common.samples = static_cast<int>(samples);
    with_input(dtype, logits, common, [&](const auto& in) {
      launch_sample(
          in, {rows, in.samples, tokens, valid, logprobs, rank, num_kept, kept_mass, entropy, cuts},
          nullptr);
    });
  });
}

extern "C" int kept_offsets(const int64_t* counts, int64_t rows, int64_t* offsets) {
  return emu::guarded([&] { launch_kept_offsets(counts, rows, offsets, nullptr); });
}

extern "C" int kept_ids(int64_t dtype, const void* logits, int64_t logits_rows, int64_t inner,
                        int64_t vocab, int64_t outer_stride, int64_t inner_stride,
                        const bool* flags, const uint32_t* bits, int64_t allowed_per_row,
                        const int64_t* row_indices, int64_t rows, const int32_t* cuts,
                        const int64_t* offsets, int32_t* ids) {
  return emu::guarded([&] {
    const auto common = input(logits_rows, inner, vocab, outer_stride, inner_stride, flags, bits,
                              allowed_per_row, row_indices);
    with_input(dtype, logits, common,
               [&](const auto& in) { launch_kept_ids(in, rows, cuts, offsets, ids, nullptr); });
  });
}
