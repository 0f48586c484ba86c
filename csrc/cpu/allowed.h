// allowed: the tokens that each row may take, as bools or as bits, one set a row or one for all.
#pragma once

#include <optional>

#include "types.h"

namespace pyllmtune {

struct AllowedTokens {  // of one row; both null: all of them
  const bool* flags = nullptr;
  const int32_t* words = nullptr;  // token i is bit i % 32 of word i / 32

  bool all() const { return flags == nullptr && words == nullptr; }

  // x, which holds the n ids from `first` on, with -inf where they are not allowed; `first` is a
  // multiple of the width.
  template <class V>
  V only(V x, int64_t first, int64_t n) const {
    const V none(-std::numeric_limits<typename V::Scalar>::infinity());
    if (flags != nullptr) x = select(load_mask_up_to<V>(flags + first, n), x, none);
    if (words == nullptr) return x;
    const uint32_t word = static_cast<uint32_t>(words[first / 32]) >> (first % 32);
    if constexpr (V::kWidth == 1)
      return select((word & 1) != 0, x, none);
    else
      return select(mask_of_bits(word & 0xffff), x, none);
  }
};

struct AllowedSets {
  AllowedTokens first;
  int64_t flags_step = 0, words_step = 0;  // from one row's set to the next; 0: one set for all

  bool shared() const { return flags_step == 0 && words_step == 0; }
  AllowedTokens operator[](int64_t row) const {
    return {first.flags == nullptr ? nullptr : first.flags + row * flags_step,
            first.words == nullptr ? nullptr : first.words + row * words_step};
  }
};

// `allowed`: bool [rows or 1, V] or int32 [rows or 1, ceil(V / 32)].
inline AllowedSets allowed_sets(const std::optional<torch::stable::Tensor>& allowed, int64_t rows,
                                int64_t vocab) {
  if (!allowed) return {};
  const bool dense = allowed->scalar_type() == ScalarType::Bool;
  const int64_t width = dense ? vocab : (vocab + 31) / 32;
  const bool shared = allowed->size(0) == 1 && rows != 1;
  check_flat(*allowed, (shared ? 1 : rows) * width, dense ? ScalarType::Bool : ScalarType::Int,
             "allowed");
  const int64_t step = shared ? 0 : width;
  if (dense) return {{data<const bool>(*allowed), nullptr}, step, 0};
  return {{nullptr, data<const int32_t>(*allowed)}, 0, step};
}

}  // namespace pyllmtune
