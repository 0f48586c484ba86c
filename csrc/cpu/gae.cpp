// gae: generalised advantage estimation (Schulman et al. 2016) and returns of packed sequences.
//
//   rewards, values [total] -> advantages, returns [total]; sequence i is offsets[i]:offsets[i + 1]
//   R_t = r_t + x_{t+1},  A_t = R_t - V_t,  x_t = own_t + decay_t x_{t+1}  (math/discount_flow.h)
//   Reads 8 to 10 bytes a token, writes 8. A sequence is walked from its end, in double. Each step
//   waits for the last one, some 9 cycles, so a thread walks four sequences in turn. Limits: one
//   sequence is work for one thread.
#include <torch/csrc/stable/library.h>

#include "../math/discount_flow.h"
#include "parallel.h"
#include "sequences.h"
#include "types.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;

constexpr int kTogether = 4;  // sequences in turn: 4 x 8 loads and operations fill 9 cycles

template <class F>
struct Inputs {
  const F *rewards, *values;
  const bool *mask, *terminated;  // or null, as are the next three
  const F *bootstrap, *gammas, *lams;
  const int64_t* offsets;
  double gamma, lam;
  bool carry_masked;

  RewardToken<double> token(int64_t t) const {
    const bool selected = mask == nullptr || mask[t];
    const double reward = selected ? rewards[t] : F(0), value = selected ? values[t] : F(0);
    return {selected, selected && terminated != nullptr && terminated[t], reward, value};
  }
};

template <class F>
struct Outputs {
  F *advantages, *returns;
};

// One sequence on its way to its beginning.
template <class F>
class Walk {
 public:
  Walk() = default;
  Walk(const Inputs<F>& in, int64_t sequence)
      : begin_(in.offsets[sequence]),
        t_(in.offsets[sequence + 1]),
        by_{in.gammas == nullptr ? in.gamma : in.gammas[sequence],
            in.lams == nullptr ? in.lam : in.lams[sequence]},
        x_(in.bootstrap == nullptr ? 0.0 : by_.gamma * in.bootstrap[sequence]) {}

  int64_t left() const { return t_ - begin_; }

  void step(const Inputs<F>& in, const Outputs<F>& out) {
    const RewardToken<double> token = in.token(--t_);
    const double result = token_return(token, x_);
    out.returns[t_] = token.selected ? F(result) : F(0);
    out.advantages[t_] = token.selected ? F(result - token.value) : F(0);
    x_ = token_flow(token, by_, in.carry_masked)(x_);
  }

 private:
  int64_t begin_, t_;
  Discount<double> by_;
  double x_;
};

template <class F>
void walk_together(const Inputs<F>& in, int64_t first, const Outputs<F>& out) {
  Walk<F> walks[kTogether];
  int64_t shared = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < kTogether; ++i) {
    walks[i] = Walk<F>(in, first + i);
    shared = std::min(shared, walks[i].left());
  }
  for (int64_t s = 0; s < shared; ++s)
    for (Walk<F>& walk : walks) walk.step(in, out);
  for (Walk<F>& walk : walks)
    while (walk.left() > 0) walk.step(in, out);
}

template <class F>
void all_sequences(const Inputs<F>& in, int64_t sequences, const Outputs<F>& out) {
  parallel_for(sequences, sequence_grain(sequences, in.offsets[sequences]),
               [&](int64_t begin, int64_t end) {
                 int64_t i = begin;
                 for (; i + kTogether <= end; i += kTogether) walk_together(in, i, out);
                 for (; i < end; ++i)
                   for (Walk<F> walk(in, i); walk.left() > 0;) walk.step(in, out);
               });
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& offsets,
                               std::optional<Tensor> mask, std::optional<Tensor> terminated,
                               std::optional<Tensor> bootstrap, double gamma, double lam,
                               std::optional<Tensor> sequence_gamma,
                               std::optional<Tensor> sequence_lam, bool carry_masked) {
  const int64_t total = rewards.numel(), sequences = offsets.numel() - 1;
  const auto dtype = rewards.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "rewards must be float32 or float64");
  auto run = [&](auto element) {
    using F = decltype(element);
    auto flat = [&](const Tensor& x, int64_t numel, const char* name) {
      check_flat(x, numel, dtype, name);
      return data<const F>(x);
    };
    auto per_sequence = [&](const std::optional<Tensor>& x, const char* name) {
      return x ? flat(*x, sequences, name) : nullptr;
    };
    auto flags = [&](const std::optional<Tensor>& x, const char* name) -> const bool* {
      if (!x) return nullptr;
      check_flat(*x, total, ScalarType::Bool, name);
      return data<const bool>(*x);
    };
    const Inputs<F> in{flat(rewards, total, "rewards"),
                       flat(values, total, "values"),
                       flags(mask, "mask"),
                       flags(terminated, "terminated"),
                       per_sequence(bootstrap, "bootstrap"),
                       per_sequence(sequence_gamma, "gamma"),
                       per_sequence(sequence_lam, "lam"),
                       check_offsets(offsets, total),
                       gamma,
                       lam,
                       carry_masked};
    Tensor advantages = torch::stable::new_empty(rewards, {total}, dtype);
    Tensor returns = torch::stable::new_empty(rewards, {total}, dtype);
    all_sequences(in, sequences, {data<F>(advantages), data<F>(returns)});
    return std::make_tuple(advantages, returns);
  };
  return dtype == ScalarType::Double ? run(double()) : run(float());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace pyllmtune
