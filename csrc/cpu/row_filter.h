// row_filter: which tokens of a row temperature, top-k, top-p and min-p keep, without a sort.
//
// Every filter keeps a prefix of the order (value descending, id ascending), so the kept set is a
// Cut. It is found among few candidates where a bound leaves few:
//   top-k: the k-th largest block maximum is at most the k-th largest logit;
//   top-p: tokens below (1 - p)/V of the mass have less than 1 - p together, so the nucleus lies
//          above. Higher bounds are tried first: the exact mass of the candidates proves them;
//   min-p: its own threshold.
// Where they are many (flat rows), a histogram over the row finds the slice of values in which the
// prefix ends, and the search goes on in that slice. Both ways give the same cut, to the token.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "mass_blocks.h"
#include "parallel.h"

namespace pyllmtune {

enum class Order : int64_t { kHf, kVllm, kLlamaCpp, kJoint };

struct FilterRule {
  float temperature = 1.0f;
  int64_t top_k = 0;
  double top_p = 1.0;
  float min_p = 0.0f;
  Order order = Order::kHf;

  bool operator==(const FilterRule&) const = default;
  bool sound() const {
    return temperature >= 0.0f && std::isfinite(temperature) && top_p == top_p && min_p == min_p;
  }
  bool has_p() const { return top_p < 1.0; }
  bool has_m() const { return min_p > 0.0f; }
};

struct Threshold {  // where a prefix ends: among the tokens of value z, after `ties` of them
  float z;
  int64_t ties;
};

// The shortest prefix of `list` whose mass reaches `need`, at least 1 and at most that of the
// whole. Weighted quickselect with three parts; reorders the list.
inline Threshold select_prefix(std::vector<Candidate>& list, int64_t need) {
  auto low = list.begin(), high = list.end();
  while (true) {
    const float a = low->z, b = low[(high - low) / 2].z, c = (high - 1)->z;
    const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    const auto equal = std::partition(low, high, [=](const Candidate& x) { return x.z > pivot; });
    const auto less = std::partition(equal, high, [=](const Candidate& x) { return x.z == pivot; });
    int64_t above = 0;
    for (auto it = low; it != equal; ++it) above += it->mass;
    if (above >= need) {
      high = equal;
      continue;
    }
    const int64_t each = equal->mass, same = each * (less - equal);
    if (above + same >= need) return {pivot, (need - above + each - 1) / each};
    need -= above + same;
    low = less;
  }
}

template <class T>
class RowFilter {
 public:
  // What `find` leaves: the cut and, unless `in_list` is false, the kept tokens in order of id.
  Cut cut;
  bool in_list = false;
  bool valid = false, greedy = false;
  int64_t num_kept = 0;  // where the kept tokens are not listed, once kept_masses has counted them
  std::vector<Candidate> list;
  std::vector<float> block_max;
  Scale scale;  // of the temperature of the draw

  void find(const T* row, int64_t vocab, const FilterRule& rule) {
    z_ = row, vocab_ = vocab, rule_ = rule;
    cut = Cut(), in_list = false, greedy = false, num_kept = 0, total_ = 0;
    list.clear();
    scan();
    valid = valid && rule.sound();
    if (!valid) return;
    greedy = is_greedy(rule.temperature);
    scale = {top_, greedy ? kMassLog2E : mass_rate(rule.temperature), mass_bits(vocab)};
    filter_scale_ = scale;
    if (rule.order == Order::kLlamaCpp) filter_scale_.rate = kMassLog2E;
    if (greedy) {
      keep_first_top();
    } else if (!find_in_list()) {
      find_in_row();
    }
  }

  bool sound() const { return sound_; }  // the row holds neither NaN nor +inf
  int64_t blocks() const { return static_cast<int64_t>(block_max.size()); }
  const T* begin(int64_t block) const { return z_ + block * kBlock; }
  int64_t length(int64_t block) const { return std::min(kBlock, vocab_ - block * kBlock); }

  // Masses of all allowed tokens by `by`, a sum for each block into `out` (or nowhere).
  template <bool kWeighted = false>
  Masses all_masses(const Scale& by, int64_t* out) const {
    return sum_blocks<false, kWeighted>(by, Cut(), out);
  }
  // The same of the kept tokens, which are counted on the way.
  template <bool kWeighted = false>
  Masses kept_masses(const Scale& by, int64_t* out) {
    const bool all = cut.z == kNone && cut.least_y == kNone;
    const Masses kept = all ? sum_blocks<false, kWeighted>(by, cut, out)
                            : sum_blocks<true, kWeighted>(by, cut, out);
    num_kept = all ? allowed_ : kept.count;
    if (all && by.rate == filter_scale_.rate) total_ = kept.mass;
    return kept;
  }
  // Mass of all allowed tokens at the temperature of the draw.
  int64_t total_mass() {
    if (scale.rate == filter_scale_.rate) return total_of_row();
    return all_masses(scale, nullptr).mass;
  }

  // f(begin, end) over parts of the row's blocks, on several threads if this is not one of several.
  template <class Function>
  void for_blocks(const Function& f) const {
    parallel_for(blocks(), 128, f);  // 128 blocks: 32,768 logits
  }

 private:
  static constexpr int64_t kFew = 8192;  // candidates: above it the histogram is faster
  static constexpr int64_t kBins = 2048;

  const T* z_ = nullptr;
  int64_t vocab_ = 0, allowed_ = 0;
  bool sound_ = true;  // no NaN, no +inf
  FilterRule rule_;
  float top_ = 0.0f;
  Scale filter_scale_;  // of the temperature that the filters see
  int64_t total_ = 0;   // mass of the row by it; 0: not known yet
  std::vector<Candidate> work_;
  std::vector<int64_t> allowed_in_block_;
  std::vector<float> maxima_;
  std::vector<int64_t> bins_;

  void scan() {
    const int64_t count = (vocab_ + kBlock - 1) / kBlock;
    block_max.resize(count);
    allowed_in_block_.resize(count);
    for_blocks([&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const BlockScan found = scan_block(begin(block), length(block));
        block_max[block] = found.max;
        allowed_in_block_[block] = found.sound ? found.allowed : -1;
      }
    });
    sound_ = true, allowed_ = 0, top_ = kNone;
    for (int64_t block = 0; block < count; ++block) {
      sound_ = sound_ && allowed_in_block_[block] >= 0;
      allowed_ += allowed_in_block_[block];
      top_ = std::max(top_, block_max[block]);
    }
    valid = sound_ && allowed_ > 0;
  }

  void keep_first_top() {
    const Cut tops{top_, vocab_, kNone};
    for (int64_t block = 0; list.empty(); ++block)
      if (block_max[block] == top_)
        gather_block(begin(block), length(block), block * kBlock, scale, tops, list);
    list.resize(1);
    take_list();
  }

  int64_t total_of_row() {
    if (total_ == 0) total_ = all_masses(filter_scale_, nullptr).mass;
    return total_;
  }
  bool has_k() const { return rule_.top_k > 0 && rule_.top_k < allowed_; }
  float least_y() const { return log2_exact(std::min(rule_.min_p, 1.0f)); }

  void take_list() {
    in_list = true;
    num_kept = static_cast<int64_t>(list.size());
    cut = {kNone, -1, kNone};
    for (const Candidate& x : list)
      if (x.z <= cut.z || cut.id < 0) cut.z = x.z, cut.id = x.id;
  }

  // Gathers by `by`; false if that is more than kFew.
  bool gather(const Cut& by) {
    list.clear();
    for (int64_t block = 0; block < blocks(); ++block) {
      const float max = block_max[block];
      if (max < by.z || mass_exponent(max, top_, filter_scale_.rate) < by.least_y) continue;
      gather_block(begin(block), length(block), block * kBlock, filter_scale_, by, list);
      if (static_cast<int64_t>(list.size()) > kFew) return false;
    }
    return true;
  }
  // Gives each its mass, or 1 where tokens are counted; returns the sum.
  int64_t weigh(std::vector<Candidate>& candidates, bool by_mass) const {
    int64_t total = 0;
    for (Candidate& x : candidates) {
      const float y = mass_exponent(x.z, top_, filter_scale_.rate);
      x.mass = by_mass ? mass_of(y, filter_scale_.bits) : 1;
      total += x.mass;
    }
    return total;
  }

  void shorten_list(int64_t need) {
    work_ = list;
    Threshold end = select_prefix(work_, need);
    std::erase_if(list, [&](const Candidate& x) {
      return !(x.z > end.z || (x.z == end.z && end.ties-- > 0));
    });
  }
  void shorten_list_by_min_p() {
    const float least = least_y(), rate = filter_scale_.rate;
    std::erase_if(list, [&](const Candidate& x) { return mass_exponent(x.z, top_, rate) < least; });
  }

  bool m_first() const { return rule_.has_m() && rule_.order == Order::kVllm; }
  int64_t needed(int64_t base) const {
    return needed_mass(base, fraction_of(std::max(rule_.top_p, 0.0)));
  }

  // The filters on candidates; false if these are too many.
  bool find_in_list() {
    if (!has_k() && !m_first() && rule_.has_p()) {
      if (!list_nucleus()) return false;
    } else {
      Cut bound{kNone, vocab_, kNone};
      if (has_k()) {
        if (rule_.top_k > blocks()) return false;
        maxima_ = block_max;
        const auto kth = maxima_.begin() + (rule_.top_k - 1);
        std::nth_element(maxima_.begin(), kth, maxima_.end(), std::greater<float>());
        bound.z = *kth;
        if (bound.z == kNone) bound = Cut();
      } else if (rule_.has_m()) {
        bound = {kNone, -1, least_y()};
      } else {
        return false;
      }
      if (!gather(bound)) return false;
      if (has_k() && weigh(list, false) > rule_.top_k) shorten_list(rule_.top_k);
      if (m_first()) shorten_list_by_min_p();
      if (rule_.has_p()) {
        const int64_t listed = weigh(list, true);
        const int64_t need = needed(rule_.order == Order::kJoint ? total_of_row() : listed);
        if (need <= listed) shorten_list(need);
      }
    }
    if (rule_.has_m() && !m_first()) shorten_list_by_min_p();
    take_list();
    return true;
  }

  // Top-p of the whole row.
  bool list_nucleus() {
    const int64_t need = needed(total_of_row());
    const double rest = std::max(1.0 - rule_.top_p, 1e-300) * static_cast<double>(total_of_row());
    const double vocab = static_cast<double>(vocab_);
    // as if the rest were spread over so many tokens: most rows are peaked; V of them is certain
    for (const double tail : {1024.0, 32768.0, vocab}) {
      const double y = std::log2(rest / std::min(tail, vocab)) - filter_scale_.bits;
      // rounded down by far more than its error
      if (!gather({kNone, -1, static_cast<float>(std::min(y, 0.0)) - 0.01f})) return false;
      if (weigh(list, true) >= need) {
        shorten_list(need);
        return true;
      }
    }
    return false;
  }

  // The filters on the row itself.
  void find_in_row() {
    list.clear();
    if (has_k()) shorten_row(rule_.top_k, false);
    if (m_first()) cut.least_y = least_y();
    if (rule_.has_p()) {
      const bool whole = !has_k() && !m_first();
      const int64_t kept = whole ? total_of_row() : kept_masses(filter_scale_, nullptr).mass;
      const int64_t need = needed(rule_.order == Order::kJoint ? total_of_row() : kept);
      if (need <= kept) shorten_row(need, true);
    }
    if (rule_.has_m()) cut.least_y = least_y();
    if (cut.least_y > kNone) cut = as_values(cut);
  }

  // The cut without its exponent, which belongs to the filters' temperature.
  Cut as_values(const Cut& by) {
    float last = top_;
    for (int64_t block = 0; block < blocks(); ++block) {
      if (mass_exponent(block_max[block], top_, filter_scale_.rate) < by.least_y) continue;
      work_.clear();
      gather_block(begin(block), length(block), block * kBlock, filter_scale_, by, work_);
      for (const Candidate& x : work_) last = std::min(last, x.z);
    }
    return {last, last == by.z ? by.id : vocab_, kNone};
  }

  float lowest_allowed() const {
    const F32x16 top(top_), none(kNone);
    F32x16 lowest(top);
    for (int64_t block = 0; block < blocks(); ++block)
      for_each_vector(begin(block), length(block), [&](F32x16 x, int64_t) {
        lowest = min_of(select(x > none, x, top), lowest);
      });
    return -reduce_max(F32x16(0.0f) - lowest);
  }

  // Shortens the prefix `cut` of the row to `need` of mass, or that many tokens.
  void shorten_row(int64_t need, bool by_mass) {
    // masses end 46 powers of two below the top; the bins need not reach further
    float span = std::max(top_ - lowest_allowed(), 1e-30f);
    if (by_mass) span = std::min(span, 46.0f / filter_scale_.rate);
    const float last_bin = kBins - 1, bins_per_logit = last_bin / std::min(span, 3e38f);
    const auto bins_of = [=, this](F32x16 x) {  // whole part: the bin
      return min_of((F32x16(top_) - x) * F32x16(bins_per_logit), F32x16(last_bin));
    };
    bins_.assign(2 * kBins, 0);  // two sets, so that equal bins in a row do not wait for each other
    for (int64_t block = 0; block < blocks(); ++block) {
      float bin[kBlock + 16], amount[kBlock + 16];
      const int64_t first = block * kBlock;
      for_each_vector(begin(block), length(block), [&](F32x16 x, int64_t i) {
        F32x16 y = exponents(x, filter_scale_);
        const Mask16 kept = kept_lanes(x, y, first + i, cut);
        const F32x16 w = by_mass ? masses(y, filter_scale_.bits) : F32x16(1.0f);
        store(amount + i, select(kept, w, F32x16(0.0f)));
        store(bin + i, select(kept, bins_of(x), F32x16(0.0f)));
      });
      for (int64_t i = 0; i < length(block); ++i)
        bins_[2 * static_cast<int64_t>(bin[i]) + i % 2] += static_cast<int64_t>(amount[i]);
    }
    int64_t bin = 0;
    for (; bins_[2 * bin] + bins_[2 * bin + 1] < need; ++bin)
      need -= bins_[2 * bin] + bins_[2 * bin + 1];

    list.clear();
    const F32x16 low(static_cast<float>(bin)), high(static_cast<float>(bin + 1));
    for (int64_t block = 0; block < blocks(); ++block) {
      const int64_t first = block * kBlock;
      for_each_vector(begin(block), length(block), [&](F32x16 x, int64_t i) {
        const F32x16 at = bins_of(x);
        const Mask16 kept = kept_lanes(x, exponents(x, filter_scale_), first + i, cut);
        append(kept & (at >= low) & (at < high), x, first + i, list);
      });
    }
    weigh(list, by_mass);
    work_ = list;  // the search loses the order of ids
    const Threshold end = select_prefix(work_, need);
    int64_t ties = end.ties;
    for (const Candidate& x : list)
      if (x.z == end.z && --ties == 0) cut = {end.z, x.id, cut.least_y};
    list.clear();
  }

  template <bool kCut, bool kWeighted>
  Masses sum_blocks(const Scale& by, const Cut& of, int64_t* out) const {
    std::vector<Masses> parts(blocks());
    for_blocks([&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const bool skip = mass_exponent(block_max[block], top_, by.rate) < kMassLowest ||
                          block_max[block] == kNone;
        if (!kCut && skip) continue;
        if (kCut && block_max[block] < of.z) continue;
        parts[block] =
            block_masses<kCut, kWeighted>(begin(block), length(block), block * kBlock, by, of);
      }
    });
    Masses sum;
    for (int64_t block = 0; block < blocks(); ++block) {
      sum.mass += parts[block].mass;
      sum.count += parts[block].count;
      sum.weighted += parts[block].weighted;
      if (out != nullptr) out[block] = parts[block].mass;
    }
    return sum;
  }
};

}  // namespace pyllmtune
