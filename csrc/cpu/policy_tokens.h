// policy_tokens: what policy_loss reads, a vector of tokens at a time.
#pragma once

#include "../math/policy_terms.h"
#include "types.h"

namespace pyllmtune {

template <class F>
struct PolicyInputs {
  const F *logprobs, *old_logprobs, *advantages;
  const bool* mask;                           // or null
  const F *ref_logprobs, *entropy, *weights;  // or null
  const int64_t* offsets;
  bool token_advantages;
  PolicyConstants<F> constants;
};

// What is not valid is 0 in log_ratio, entropy and weight; elsewhere it may be anything.
template <class V>
struct PolicyTokens {
  V logprob, old_logprob, log_ratio, advantage, weight, delta, entropy;
  MaskOf<V> valid, dropped;
};

// A token with anything that is not finite is dropped.
template <class V>
PolicyTokens<V> load_tokens(const PolicyInputs<typename V::Scalar>& in, int64_t sequence, int64_t t,
                            int64_t n) {
  const V zero(0);
  V lost = zero;  // 0, or NaN
  auto load = [&](const typename V::Scalar* x) {
    const V value = load_up_to<V>(x + t, n, 0);
    lost = fma_of(value, zero, lost);
    return value;
  };
  PolicyTokens<V> out;
  out.logprob = load(in.logprobs);
  out.old_logprob = load(in.old_logprobs);
  if (in.token_advantages) {
    out.advantage = load(in.advantages);
  } else {
    out.advantage = V(in.advantages[sequence]);
    lost = fma_of(out.advantage, zero, lost);
  }
  out.weight = V(1);
  out.delta = out.entropy = zero;
  if (in.weights != nullptr) out.weight = load(in.weights);
  if (in.entropy != nullptr) out.entropy = load(in.entropy);
  if (in.ref_logprobs != nullptr) out.delta = load(in.ref_logprobs) - out.logprob;
  MaskOf<V> selected = lanes_up_to<V>(n);
  if (in.mask != nullptr) selected = selected & load_mask_up_to<V>(in.mask + t, n);
  const auto finite = lost == zero;
  out.valid = selected & finite;
  out.dropped = selected & !finite;
  out.log_ratio = select(out.valid, out.logprob - out.old_logprob, zero);
  if (in.entropy != nullptr) out.entropy = select(out.valid, out.entropy, zero);
  if (in.weights != nullptr) out.weight = select(out.valid, out.weight, zero);
  return out;
}

// f(t, n) for each vector of [begin, end): n tokens from t, all but the last known to be whole.
template <class V, class Function>
void for_vectors(int64_t begin, int64_t end, const Function& f) {
  int64_t t = begin;
  for (; t + V::kWidth <= end; t += V::kWidth) f(t, int64_t{V::kWidth});
  if (t < end) f(t, end - t);
}

}  // namespace pyllmtune
