// discount_flow: what a token makes of the value that comes from its future, for gae.
//
// With R the return (lambda-return) and V the value, GAE is R_t = r_t + x_{t+1}, A_t = R_t - V_t,
//   x_t = gamma ((1 - lam) V_t + lam R_t)  =  own + decay * x_{t+1},  x_end = gamma V_end.
// One number flows from token to token, so a sequence is a chain of maps x -> own + decay * x, and
// chains compose: that is what makes it a scan. Shared by cpp and cuda; Triton mirrors it.
#pragma once

#include "numeric.h"

namespace pyllmtune {

// decay < 0 stands for an end of an episode: nothing flows through, not even NaN.
template <class F>
struct Flow {
  F own, decay;

  PLT_HD F operator()(F x) const { return decay < F(0) ? own : own + decay * x; }
};

template <class F>
PLT_HD Flow<F> identity_flow() {
  return {F(0), F(1)};
}

// First `late`, the tokens further in the future, then `early`.
template <class F>
PLT_HD Flow<F> compose(Flow<F> early, Flow<F> late) {
  const bool open = early.decay >= F(0) && late.decay >= F(0);
  return {early(late.own), open ? early.decay * late.decay : F(-1)};
}

template <class F>
struct Discount {
  F gamma, lam;
};

template <class F>
struct RewardToken {
  bool selected, ends;
  F reward, value;  // 0 where not selected
};

// A token that is not selected is passed by, or is a step without reward and value.
template <class F>
PLT_HD Flow<F> token_flow(const RewardToken<F>& token, Discount<F> by, bool carry_masked) {
  if (!token.selected && carry_masked) return identity_flow<F>();
  const F decay = by.gamma * by.lam;
  const F own = (by.gamma - decay) * token.value + decay * token.reward;
  return {own, token.ends ? F(-1) : decay};
}

// R_t, given what flows in from the next token.
template <class F>
PLT_HD F token_return(const RewardToken<F>& token, F x) {
  return token.ends ? token.reward : token.reward + x;
}

}  // namespace pyllmtune
