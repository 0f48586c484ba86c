// beam_step: the best continuations of the beams of each item, from one read of the logits.
//
//   logits [batch, beams, V], beam_scores [batch, beams]
//     -> scores, tokens, parents, is_eos [batch, candidates], valid [batch, beams]
//   score = beam_score + (z - max)/T - log S,   S = sum_j e^((z_j - max)/T)
//   A beam's score and log S move all its tokens alike, so its best tokens are those of the largest
//   logits: a row is read from memory once, for its sum and the maxima of its blocks (row_top.h),
//   and what is left is a merge of `beams` short lists for each item. No log-softmax, no sort of V.
//   Order: key, lower beam, higher logit, lower id; the key is the score less the penalties.
#include <torch/csrc/stable/library.h>

#include "row_top.h"
#include "rows.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Request {
  int64_t batch, beams, vocab, candidates, groups;
  RowLayout layout;
  AllowedSets allowed;
  bool renormalize;
  double temperature, penalty;
  const void* temperatures;  // [batch, beams] of what is computed in, or null
  const int64_t* widths;     // [batch], or null
  const int64_t* eos;
  int64_t eos_count;

  int64_t rows() const { return batch * beams; }
  int64_t group_size() const { return beams / groups; }
  int64_t group_candidates() const { return candidates / groups; }
  // Tokens that a row must offer: a penalty can put as many behind others as groups before go on
  // with.
  int64_t kept_of_row() const { return std::min(vocab, group_candidates() + beams - group_size()); }
  int64_t width(int64_t item) const { return widths == nullptr ? beams : widths[item]; }
  bool ends(int64_t token) const {
    return std::find(eos, eos + eos_count, token) != eos + eos_count;
  }
  template <class F>
  F inv_temperature(int64_t row) const {
    return F(1) /
           (temperatures == nullptr ? F(temperature) : static_cast<const F*>(temperatures)[row]);
  }
};

// What the rows leave for the merge.
template <class F>
struct Beam {
  SoftmaxStats<F> stats;
  std::vector<TopToken<F>> best;
};

template <class F>
struct Scored {
  F key, score, z;
  int64_t beam, token;

  bool ahead_of(const Scored& x) const {
    if (key != x.key) return key > x.key;
    if (beam != x.beam) return beam < x.beam;
    return z > x.z || (z == x.z && token < x.token);
  }
};

template <class F>
struct Results {
  F* scores;
  int64_t *tokens, *parents;
  bool *is_eos, *valid;
};

template <class F>
bool is_live(const Request& request, const F* beam_scores, int64_t row) {
  return beam_scores[row] != -std::numeric_limits<F>::infinity() &&
         row % request.beams < request.width(row / request.beams);
}

// Statistics and best tokens of every live beam.
template <class T>
std::vector<Beam<scalar_of<T>>> read_rows(const T* logits, const scalar_of<T>* beam_scores,
                                          const Request& request) {
  using F = scalar_of<T>;
  using V = typename VectorOf<T>::type;
  const int64_t rows = request.rows(), vocab = request.vocab, stripes = stripes_of(vocab);
  const int64_t blocks = (vocab + kTopBlock - 1) / kTopBlock;
  std::vector<Beam<F>> beams(rows);
  std::vector<SoftmaxStats<F>> parts(rows * stripes);
  std::vector<F> maxima(rows * blocks);
  const auto row_at = [&](int64_t row) {
    return AllowedRow<T>{logits + request.layout.offset(row), vocab, request.allowed[row]};
  };
  const bool whole_sum = !request.renormalize && !request.allowed.first.all();
  const auto read = [&](int64_t row, int64_t stripe, int64_t first, int64_t length) {
    if (!is_live(request, beam_scores, row)) return;
    const AllowedRow<T> z = row_at(row);
    const F inv_temperature = request.inv_temperature<F>(row);
    SoftmaxStats<F>& stats = parts[row * stripes + stripe];
    for (int64_t i = first; i < first + length; i += kTile) {
      const int64_t n = std::min(kTile, first + length - i);
      z.with_piece(i, n, [&](const auto* p) {
        const F top = block_maxima<V>(p, n, &maxima[row * blocks + i / kTopBlock]);
        stats = merge(stats,
                      whole_sum ? tile_stats<V, false>(z.z + i, n, inv_temperature)
                                : tile_sums<V, false>(p, n, top, inv_temperature),
                      inv_temperature);
      });
    }
  };
  const auto select = [&](int64_t row, int64_t first, int64_t) {
    if (first != 0 || !is_live(request, beam_scores, row)) return;  // once a row
    const F inv_temperature = request.inv_temperature<F>(row);
    for (int64_t stripe = 0; stripe < stripes; ++stripe)
      beams[row].stats = merge(beams[row].stats, parts[row * stripes + stripe], inv_temperature);
    RowTop<T> top;
    beams[row].best = top.find(row_at(row), &maxima[row * blocks], request.kept_of_row());
  };
  for_each_row_twice(rows, vocab, read, select);
  return beams;
}

// Appends the candidates of one beam and says whether it is sound.
template <class F>
bool add_beam(const Beam<F>& beam, F beam_score, int64_t row, const Request& request,
              const std::vector<int64_t>& chosen, std::vector<Scored<F>>& list) {
  const F none = -std::numeric_limits<F>::infinity();
  const bool sound = beam.stats.sum == beam.stats.sum && !beam.best.empty() && beam_score < -none;
  if (!sound) return false;
  const F log_sum = log_of(beam.stats.sum), inv_temperature = request.inv_temperature<F>(row);
  for (const TopToken<F>& x : beam.best) {
    const F score = beam_score + ((x.z - beam.stats.max) * inv_temperature - log_sum);
    const auto times = std::count(chosen.begin(), chosen.end(), x.id);
    const F key = score - F(request.penalty) * static_cast<F>(times);
    if (key > none) list.push_back({key, score, x.z, row % request.beams, x.id});
  }
  return true;
}

// The candidates of an item, group after group.
template <class F>
void merge_item(int64_t item, const std::vector<Beam<F>>& beams, const F* beam_scores,
                const Request& request, const Results<F>& out) {
  const int64_t size = request.group_size(), slots = request.group_candidates();
  const int64_t limit = slots * request.width(item) / request.beams;
  std::vector<Scored<F>> list;
  std::vector<int64_t> chosen;  // what earlier groups go on with
  for (int64_t group = 0; group < request.groups; ++group) {
    list.clear();
    for (int64_t beam = group * size; beam < (group + 1) * size; ++beam) {
      const int64_t row = item * request.beams + beam;
      const bool live = is_live(request, beam_scores, row);
      out.valid[row] = !live || add_beam(beams[row], beam_scores[row], row, request, chosen, list);
    }
    const int64_t found = std::min<int64_t>(limit, list.size());
    std::partial_sort(list.begin(), list.begin() + found, list.end(),
                      [](const Scored<F>& a, const Scored<F>& b) { return a.ahead_of(b); });
    int64_t going_on = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t at = item * request.candidates + group * slots + slot;
      const bool empty = slot >= found;
      out.scores[at] = empty ? -std::numeric_limits<F>::infinity() : list[slot].score;
      out.tokens[at] = empty ? -1 : list[slot].token;
      out.parents[at] = empty ? 0 : list[slot].beam;
      out.is_eos[at] = !empty && request.ends(list[slot].token);
      if (empty || out.is_eos[at] || going_on == size) continue;
      ++going_on;
      chosen.push_back(list[slot].token);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> beam_step(
    const Tensor& logits, const Tensor& beam_scores, double temperature,
    OptionalTensor row_temperature, OptionalTensor allowed, bool renormalize, OptionalTensor widths,
    OptionalTensor eos_token_ids, int64_t num_candidates, int64_t num_groups,
    double diversity_penalty) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 3, "logits must be [batch, beams, V], CPU");
  const int64_t batch = logits.size(0), beams = logits.size(1), vocab = logits.size(2);
  STD_TORCH_CHECK(vocab > 0 && (vocab == 1 || logits.stride(2) == 1),
                  "logits must be contiguous along V > 0");
  STD_TORCH_CHECK(beams > 0 && num_groups > 0 && beams % num_groups == 0 && num_candidates > 0 &&
                      num_candidates % num_groups == 0,
                  "num_groups must divide the beams and num_candidates");
  const bool wide = logits.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  check_flat(beam_scores, batch * beams, dtype, "beam_scores");
  if (row_temperature) check_flat(*row_temperature, batch * beams, dtype, "row_temperature");
  if (widths) check_flat(*widths, batch, ScalarType::Long, "widths");
  const int64_t eos_count = eos_token_ids ? eos_token_ids->numel() : 0;
  if (eos_token_ids) check_flat(*eos_token_ids, eos_count, ScalarType::Long, "eos_token_ids");
  const Request request{batch,
                        beams,
                        vocab,
                        num_candidates,
                        num_groups,
                        row_layout(logits),
                        allowed_sets(allowed, batch * beams, vocab),
                        renormalize,
                        temperature,
                        diversity_penalty,
                        row_temperature ? row_temperature->const_data_ptr() : nullptr,
                        widths ? data<const int64_t>(*widths) : nullptr,
                        eos_token_ids ? data<const int64_t>(*eos_token_ids) : nullptr,
                        eos_count};
  const auto make = [&](int64_t columns, ScalarType type) {
    return torch::stable::new_empty(logits, {batch, columns}, type);
  };
  Tensor scores = make(num_candidates, dtype);
  Tensor tokens = make(num_candidates, ScalarType::Long);
  Tensor parents = make(num_candidates, ScalarType::Long);
  Tensor is_eos = make(num_candidates, ScalarType::Bool);
  Tensor valid = make(beams, ScalarType::Bool);
  if (batch > 0)
    with_element_type(logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using F = scalar_of<T>;
      const F* given = data<const F>(beam_scores);
      const std::vector<Beam<F>> read = read_rows(data<const T>(logits), given, request);
      const Results<F> out{data<F>(scores), data<int64_t>(tokens), data<int64_t>(parents),
                           data<bool>(is_eos), data<bool>(valid)};
      const int64_t grain = 1 + 4096 / (beams * request.kept_of_row());  // candidates to sort
      parallel_for(batch, grain, [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) merge_item(item, read, given, request, out);
      });
    });
  return {scores, tokens, parents, is_eos, valid};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) { m.impl("beam_step", TORCH_BOX(&beam_step)); }

}  // namespace pyllmtune
