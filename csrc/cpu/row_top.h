// row_top: the k best allowed tokens of a row, from the maxima of its blocks.
//
// The k-th largest block maximum is at most the k-th largest logit, so blocks below it hold none of
// the k best, and of the others few tokens reach it. Where many do (equal logits), the list is cut
// back to k now and then; tokens come in order of id, so later ones must then be larger.
#pragma once

#include <algorithm>
#include <vector>

#include "allowed.h"
#include "row_stats.h"

namespace pyllmtune {

constexpr int64_t kTopBlock = 256;  // 594 maxima for V = 151,936: enough to bound a top-k closely

template <class F>
struct TopToken {
  F z;
  int64_t id;

  bool ahead_of(const TopToken& x) const { return z > x.z || (z == x.z && id < x.id); }
};

// The allowed logits of one row, read in pieces.
template <class T>
struct AllowedRow {
  using V = typename VectorOf<T>::type;
  using F = typename V::Scalar;
  const T* z;
  int64_t vocab;
  AllowedTokens allowed;

  int64_t blocks() const { return (vocab + kTopBlock - 1) / kTopBlock; }

  // f(p): p holds the logits [first, first + n), with -inf where not allowed; at most kTile.
  template <class Function>
  void with_piece(int64_t first, int64_t n, const Function& f) const {
    if (allowed.all()) return f(z + first);
    F piece[kTile];
    for (int64_t i = 0; i < n; i += V::kWidth) {
      const int64_t width = std::min<int64_t>(V::kWidth, n - i);
      const V x = load_up_to<V>(z + first + i, width, -std::numeric_limits<F>::infinity());
      store_up_to(piece + i, allowed.only(x, first + i, width), width);
    }
    f(static_cast<const F*>(piece));
  }
};

// Maxima of the blocks of p[0, n), and of them all.
template <class V, class T>
typename V::Scalar block_maxima(const T* p, int64_t n, typename V::Scalar* maxima) {
  typename V::Scalar top = -std::numeric_limits<typename V::Scalar>::infinity();
  for (int64_t i = 0; i < n; i += kTopBlock) {
    *maxima = tile_max<V>(p + i, std::min(kTopBlock, n - i));
    top = std::max(top, *maxima++);
  }
  return top;
}

template <class T>
class RowTop {
 public:
  using V = typename AllowedRow<T>::V;
  using F = typename V::Scalar;

  // The k best tokens, best first; fewer if fewer are allowed. Overwrites the maxima.
  const std::vector<TopToken<F>>& find(const AllowedRow<T>& row, F* maxima, int64_t k) {
    list_.clear();
    find_floor(maxima, row.blocks(), k);
    const int64_t limit = std::max<int64_t>(1024, 2 * k);  // 1024: rarely reached, in the cache
    for (int64_t block = 0; block < row.blocks(); ++block) {
      if (!passes(maxima[block])) continue;
      const int64_t first = block * kTopBlock, n = std::min(kTopBlock, row.vocab - first);
      row.with_piece(first, n, [&](const auto* p) { gather(p, n, first); });
      if (static_cast<int64_t>(list_.size()) > limit) cut_back(k);
    }
    if (static_cast<int64_t>(list_.size()) > k) cut_back(k);
    std::sort(list_.begin(), list_.end(), ahead);
    return list_;
  }

 private:
  std::vector<TopToken<F>> list_;
  std::vector<F> work_;
  F floor_;
  bool floor_passes_;

  static bool ahead(const TopToken<F>& a, const TopToken<F>& b) { return a.ahead_of(b); }
  bool passes(F z) const { return z > floor_ || (floor_passes_ && z == floor_); }

  void find_floor(const F* maxima, int64_t blocks, int64_t k) {
    floor_ = -std::numeric_limits<F>::infinity();
    if (k <= blocks) {
      work_.assign(maxima, maxima + blocks);
      std::nth_element(work_.begin(), work_.begin() + (k - 1), work_.end(), std::greater<F>());
      floor_ = work_[k - 1];
    }
    floor_passes_ = floor_ > -std::numeric_limits<F>::infinity();  // -inf is not allowed
  }

  template <class P>
  void gather(const P* p, int64_t n, int64_t first) {
    const V floor(floor_);
    for (int64_t i = 0; i < n; i += V::kWidth) {
      const int64_t width = std::min<int64_t>(V::kWidth, n - i);
      const V x = load_up_to<V>(p + i, width, -std::numeric_limits<F>::infinity());
      if (count(floor_passes_ ? x >= floor : x > floor) == 0) continue;
      F lane[V::kWidth];
      store(lane, x);
      for (int64_t j = 0; j < width; ++j)
        if (passes(lane[j])) list_.push_back({lane[j], first + i + j});
    }
  }

  void cut_back(int64_t k) {
    std::nth_element(list_.begin(), list_.begin() + (k - 1), list_.end(), ahead);
    list_.resize(k);
    floor_ = list_[k - 1].z;
    floor_passes_ = false;
  }
};

}  // namespace pyllmtune
