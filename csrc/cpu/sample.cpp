// sample: draw tokens from the filtered softmax of a row, by inverting the cumulative integer
// masses of its kept tokens, in order of id, at one 64-bit Philox number a draw.
//
//   logits [outer, inner, V] -> tokens [R, S], R rows (all, or row_indices [R]), S draws a row
//   token = first id with  sum of kept masses up to it > floor(u * kept mass / 2^64)
//   One read of the logits from memory; the masses and the search come from the cache. No sort.
//   The draw depends on the row, its parameters, seed, position and number alone: same token with
//   any threads, batch, strides and instruction set (csrc/math/masses.h, row_filter.h).
#include <torch/csrc/stable/library.h>

#include "../math/philox.h"
#include "allowed.h"
#include "filter_arguments.h"
#include "rows.h"

namespace pyllmtune {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr double kLn2 = 0.6931471805599453;

struct Request {
  FilterArguments filters;
  PerRow<int64_t> seed, position;
  int64_t rows, samples, vocab;
  AllowedSets allowed;
  const int64_t* row_indices;  // or null
  bool want_scores, want_stats, want_totals, want_kept;

  int64_t source(int64_t row) const { return row_indices == nullptr ? row : row_indices[row]; }
};

struct Results {
  int64_t *tokens, *rank, *num_kept;
  bool* valid;
  float *raw, *scaled, *processed, *kept_mass, *entropy;
  std::vector<std::vector<int32_t>> kept;  // of each row
};

// A row ready to be drawn from: the kept tokens or block sums, and the totals that were asked for.
template <class T>
struct Prepared {
  RowFilter<T> filter;
  std::vector<int64_t> block_mass;  // where the kept tokens are not in a list
  int64_t mass = 0;                 // of the kept
  double log_kept = 0, log_total = 0, log_plain = 0, entropy = 0;

  static double log_mass(int64_t mass, int bits) {
    return std::log(static_cast<double>(mass)) - bits * kLn2;
  }

  void prepare(const T* row, const Request& request, const FilterRule& rule) {
    filter.find(row, request.vocab, rule);
    if (!filter.valid) return;
    const Scale scale = filter.scale;
    double weighted = 0;  // sum of mass * y over the kept
    mass = 0;
    if (filter.greedy) {
      filter.list[0].mass = mass = 1;
      log_kept = log_total = entropy = 0;
    } else if (filter.in_list) {
      for (Candidate& x : filter.list) {
        const float y = mass_exponent(x.z, scale.top, scale.rate);
        x.mass = mass_of(y, scale.bits);
        mass += x.mass;
        if (x.mass > 0) weighted += static_cast<double>(x.mass) * y;
      }
    } else {
      block_mass.resize(filter.blocks());
      const Masses kept = request.want_stats
                              ? filter.template kept_masses<true>(scale, block_mass.data())
                              : filter.kept_masses(scale, block_mass.data());
      mass = kept.mass, weighted = kept.weighted;
    }
    if (!filter.greedy) {
      log_kept = log_mass(mass, scale.bits);
      entropy = std::max(0.0, log_kept - weighted / static_cast<double>(mass) * kLn2);
    }
    const bool plain = scale.rate == kMassLog2E;  // temperature 1
    if (!request.want_totals) return;
    if (!filter.greedy) log_total = log_mass(filter.total_mass(), scale.bits);
    if (!request.want_scores) return;
    const Scale at_one{scale.top, kMassLog2E, scale.bits};
    log_plain = plain && !filter.greedy
                    ? log_total
                    : log_mass(filter.all_masses(at_one, nullptr).mass, scale.bits);
  }

  // The token in whose mass `target` falls.
  Candidate draw(int64_t target) const {
    if (filter.in_list) {
      auto it = filter.list.begin();
      for (; target >= it->mass; ++it) target -= it->mass;
      return *it;
    }
    int64_t block = 0;
    for (; target >= block_mass[block]; ++block) target -= block_mass[block];
    std::vector<Candidate> tokens;
    const int64_t first = block * kBlock, n = filter.length(block);
    gather_block(filter.begin(block), n, first, filter.scale, filter.cut, tokens);
    auto it = tokens.begin();
    for (;; ++it) {
      const float y = mass_exponent(it->z, filter.scale.top, filter.scale.rate);
      const int64_t w = mass_of(y, filter.scale.bits);
      if (target < w) return *it;
      target -= w;
    }
  }

  // 1 + tokens ahead of x, all of which are kept: the kept set is a prefix of the order.
  int64_t rank(const Candidate& x) const {
    int64_t ahead = 0;
    if (filter.in_list)
      for (const Candidate& other : filter.list)
        ahead += other.z > x.z || (other.z == x.z && other.id < x.id);
    else
      for (int64_t block = 0; block < filter.blocks(); ++block)
        if (filter.block_max[block] >= x.z)
          ahead +=
              count_ahead(filter.begin(block), filter.length(block), block * kBlock, x.z, x.id);
    return ahead + 1;
  }
};

void mark_invalid(int64_t row, const Request& request, Results& out) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  out.valid[row] = false;
  out.num_kept[row] = 0;
  if (request.want_stats) out.kept_mass[row] = out.entropy[row] = nan;
  for (int64_t i = row * request.samples; i < (row + 1) * request.samples; ++i) {
    out.tokens[i] = -1;
    if (request.want_stats) out.rank[i] = 0;
    if (request.want_scores) out.raw[i] = out.scaled[i] = out.processed[i] = nan;
  }
}

template <class T>
void draw_row(const Prepared<T>& prepared, int64_t row, const Request& request, Results& out) {
  const RowFilter<T>& filter = prepared.filter;
  out.valid[row] = true;
  out.num_kept[row] = filter.num_kept;
  if (request.want_stats) {
    out.kept_mass[row] = static_cast<float>(std::exp(prepared.log_kept - prepared.log_total));
    out.entropy[row] = static_cast<float>(prepared.entropy);
  }
  const double per_logit = filter.greedy ? 0.0 : filter.scale.rate * kLn2;  // 1 / T
  for (int64_t s = 0; s < request.samples; ++s) {
    const int64_t i = row * request.samples + s;
    const uint64_t u = uniform_of(request.seed[row], request.position[row], s);
    const Candidate x =
        prepared.draw(static_cast<int64_t>(multiply_high(u, static_cast<uint64_t>(prepared.mass))));
    out.tokens[i] = x.id;
    if (request.want_stats) out.rank[i] = prepared.rank(x);
    if (!request.want_scores) continue;
    const double z = static_cast<double>(x.z) - filter.scale.top;
    out.raw[i] = static_cast<float>(z - prepared.log_plain);
    out.scaled[i] = static_cast<float>(std::min(0.0, z * per_logit - prepared.log_total));
    out.processed[i] = static_cast<float>(std::min(0.0, z * per_logit - prepared.log_kept));
  }
  if (!request.want_kept) return;
  std::vector<Candidate> gathered;
  const std::vector<Candidate>* kept = &filter.list;
  if (!filter.in_list) {
    kept = &gathered;
    for (int64_t block = 0; block < filter.blocks(); ++block)
      gather_block(filter.begin(block), filter.length(block), block * kBlock, filter.scale,
                   filter.cut, gathered);
  }
  out.kept[row].reserve(kept->size());
  for (const Candidate& x : *kept) out.kept[row].push_back(x.id);
}

// The row as float32, -inf where not allowed.
template <class T>
void copy_allowed(const T* z, const AllowedTokens& allowed, int64_t vocab, float* out) {
  const auto vector_at = [&](int64_t i, int64_t n) {
    if constexpr (std::is_same_v<T, double>) {
      float lane[16] = {};
      for (int64_t k = 0; k < n; ++k) lane[k] = static_cast<float>(z[i + k]);
      return load(lane);
    } else {
      return load_up_to<F32x16>(z + i, n, kNone);
    }
  };
  for (int64_t i = 0; i < vocab; i += 16) {
    const int64_t n = std::min<int64_t>(16, vocab - i);
    store_up_to(out + i, allowed.only(vector_at(i, n), i, n), n);
  }
}

template <class T>
void sample_rows(const T* logits, RowLayout layout, const Request& request, Results& out) {
  const bool copied = !request.allowed.first.all() || std::is_same_v<T, double>;
  // a double is read from its float copy alone; the other branch is then never taken
  using Direct = std::conditional_t<std::is_same_v<T, double>, float, T>;
  for_rows(request.rows, request.vocab, [&](int64_t first, int64_t last) {
    Prepared<Direct> direct;
    Prepared<float> of_copy;
    std::vector<float> copy(copied ? request.vocab : 0);
    int64_t ready = -1;  // the row that `direct` or `of_copy` holds
    for (int64_t row = first; row < last; ++row) {
      const T* z = logits + layout.offset(request.source(row));
      const FilterRule rule = request.filters[row];
      // several draws from one row share its preparation
      const bool again = ready >= 0 && request.source(ready) == request.source(row) &&
                         request.filters[ready] == rule && request.allowed.shared();
      const auto run = [&](auto& prepared, const auto* source) {
        if (!again) prepared.prepare(source, request, rule);
        if (prepared.filter.valid)
          draw_row(prepared, row, request, out);
        else
          mark_invalid(row, request, out);
      };
      if (copied) {
        if (!again) copy_allowed(z, request.allowed[row], request.vocab, copy.data());
        run(of_copy, copy.data());
      } else {
        run(direct, reinterpret_cast<const Direct*>(z));
      }
      ready = row;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample(
    const Tensor& logits, double temperature, OptionalTensor row_temperature, int64_t top_k,
    OptionalTensor row_top_k, double top_p, OptionalTensor row_top_p, double min_p,
    OptionalTensor row_min_p, int64_t order, OptionalTensor allowed, OptionalTensor row_indices,
    int64_t num_samples, int64_t seed, OptionalTensor row_seed, int64_t position,
    OptionalTensor row_position, bool logprobs, bool return_stats, bool totals, bool return_kept) {
  check_logits(logits);
  const int64_t sources = logits.size(0) * logits.size(1), vocab = logits.size(2);
  const int64_t rows = row_indices ? row_indices->numel() : sources;
  STD_TORCH_CHECK(num_samples > 0, "num_samples must be at least 1, got ", num_samples);
  const int64_t* indices = nullptr;
  if (row_indices) {
    check_flat(*row_indices, rows, ScalarType::Long, "row_indices");
    indices = data<const int64_t>(*row_indices);
    for (int64_t row = 0; row < rows; ++row)
      STD_TORCH_CHECK(indices[row] >= 0 && indices[row] < sources, "row_indices must be in [0, ",
                      sources, "), got ", indices[row]);
  }
  const Request request{filter_arguments(rows, temperature, row_temperature, top_k, row_top_k,
                                         top_p, row_top_p, min_p, row_min_p, order),
                        {seed, row_seed, rows, ScalarType::Long, "row_seed"},
                        {position, row_position, rows, ScalarType::Long, "row_position"},
                        rows,
                        num_samples,
                        vocab,
                        allowed_sets(allowed, rows, vocab),
                        indices,
                        logprobs,
                        return_stats,
                        totals,
                        return_kept};

  const int64_t some = return_stats ? rows : 0;
  const auto make = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(logits, shape, dtype);
  };
  Tensor tokens = make({rows, num_samples}, ScalarType::Long);
  Tensor valid = make({rows}, ScalarType::Bool);
  Tensor scores = make({logprobs ? 3 : 0, rows, num_samples}, ScalarType::Float);
  Tensor rank = make({some, num_samples}, ScalarType::Long);
  Tensor num_kept = make({rows}, ScalarType::Long);
  Tensor kept_mass = make({some}, ScalarType::Float);
  Tensor entropy = make({some}, ScalarType::Float);
  float* score = data<float>(scores);
  const int64_t draws = rows * num_samples;
  Results out{data<int64_t>(tokens),
              data<int64_t>(rank),
              data<int64_t>(num_kept),
              data<bool>(valid),
              score,
              score + (logprobs ? draws : 0),
              score + (logprobs ? 2 * draws : 0),
              data<float>(kept_mass),
              data<float>(entropy),
              {}};
  if (return_kept) out.kept.resize(rows);
  if (rows > 0)
    with_element_type(logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      sample_rows(data<const T>(logits), row_layout(logits), request, out);
    });
  int64_t total = 0;
  for (const auto& ids : out.kept) total += static_cast<int64_t>(ids.size());
  Tensor kept_ids = make({total}, ScalarType::Int);
  int32_t* id = data<int32_t>(kept_ids);
  for (const auto& ids : out.kept) id = std::copy(ids.begin(), ids.end(), id);
  return {tokens, valid, scores, rank, num_kept, kept_mass, entropy, kept_ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyllmtune, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace pyllmtune
