// host_beams: the running beams of a search, its tree of tokens, and a heap of finished hypotheses.
//
//   advance: candidates of one step, best first -> the beams that run on, and what became of each.
//   A candidate that ends among the first `width` is finished: its sum / length^penalty competes
//   for a place in a heap of `width`. Other candidates that do not end run on, at most `width`.
//   The tree has a node per running or finished candidate; a hypothesis is a path to its root.
//   pyllmtune/decoding/hypotheses.py is the same in Python, and says more; the tests compare them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace plt {

enum class Fate : int { kPruned, kRunning, kFinished };
enum class EarlyStopping : int { kFalse, kTrue, kNever };

struct Hypothesis {
  double score = 0.0;            // sum of log-probs / length^penalty
  std::vector<int64_t> tokens;   // first to last, the ending token included
  std::vector<int64_t> parents;  // the beam that each token was appended to
  std::vector<double> sums;      // cumulative log-probs after each token
};

struct Step {
  std::vector<int64_t> parents, tokens;  // [items * width]; a dead beam: 0, 0, -inf
  std::vector<double> sums;
  std::vector<std::vector<int>> fates;  // [items, candidates], of Fate
};

class BeamHypotheses {
 public:
  template <typename T>
  using Rows = std::vector<std::vector<T>>;

  BeamHypotheses(int64_t items, int64_t width, double length_penalty, EarlyStopping early_stopping,
                 int64_t min_length, int64_t max_length)
      : width_(width),
        length_penalty_(length_penalty),
        early_stopping_(early_stopping),
        min_length_(min_length),
        max_length_(max_length),
        items_(items) {
    if (items < 0 || width < 1 || max_length < 1)
      throw std::invalid_argument("items must be at least 0, width and max_length at least 1");
    for (Item& item : items_) item.beams.assign(1, kRoot);
  }

  Step advance(const Rows<double>& sums, const Rows<int64_t>& tokens, const Rows<int64_t>& parents,
               const Rows<bool>& ends) {
    check_sizes(sums.size(), tokens.size(), parents.size(), ends.size(), items_.size());
    ++length_;
    Step step;
    for (size_t i = 0; i < items_.size(); ++i) {
      check_sizes(sums[i].size(), tokens[i].size(), parents[i].size(), ends[i].size(),
                  sums[i].size());
      step.fates.push_back(advance_item(items_[i], sums[i], tokens[i], parents[i], ends[i], step));
    }
    return step;
  }

  bool done() const {
    return std::all_of(items_.begin(), items_.end(), [](const Item& item) { return item.done; });
  }

  std::vector<Hypothesis> finished(int64_t item) const {
    std::vector<Finished> heap = items_.at(static_cast<size_t>(item)).heap;
    std::sort(heap.begin(), heap.end(), better);
    std::vector<Hypothesis> best;
    for (const Finished& one : heap) best.push_back(path(one));
    return best;
  }

 private:
  static constexpr int64_t kRoot = -1;

  struct Node {
    int64_t previous, token, parent;
    double sum;
  };
  struct Finished {
    double score;
    int64_t node;  // older nodes have lower numbers
  };
  struct Item {
    std::vector<int64_t> beams;  // nodes; fewer than `width` if the others are dead
    std::vector<Finished> heap;  // the worst in front
    bool done = false;
  };

  static bool better(const Finished& a, const Finished& b) {
    return a.score != b.score ? a.score > b.score : a.node < b.node;
  }

  static void check_sizes(size_t a, size_t b, size_t c, size_t d, size_t expected) {
    if (a != expected || b != expected || c != expected || d != expected)
      throw std::invalid_argument("sums, tokens, parents and ends must be [items, candidates]");
  }

  std::vector<int> advance_item(Item& item, const std::vector<double>& sums,
                                const std::vector<int64_t>& tokens,
                                const std::vector<int64_t>& parents, const std::vector<bool>& ends,
                                Step& step) {
    std::vector<int> fates(sums.size(), static_cast<int>(Fate::kPruned));
    std::vector<int64_t> running;
    int64_t rank = 0;
    for (size_t c = 0; c < sums.size() && !item.done; ++c) {
      const bool possible = sums[c] > -std::numeric_limits<double>::infinity();  // NaN is not
      if (!possible || (ends[c] && length_ < min_length_)) continue;
      if (parents[c] < 0 || parents[c] >= static_cast<int64_t>(item.beams.size()))
        throw std::invalid_argument("parents must be running beams, got " +
                                    std::to_string(parents[c]));
      const bool last = ends[c] || length_ == max_length_;
      const bool wanted = last ? rank < width_ : static_cast<int64_t>(running.size()) < width_;
      ++rank;
      if (!wanted) continue;
      const auto node = static_cast<int64_t>(nodes_.size());
      nodes_.push_back(
          {item.beams[static_cast<size_t>(parents[c])], tokens[c], parents[c], sums[c]});
      fates[c] = static_cast<int>(last ? Fate::kFinished : Fate::kRunning);
      if (last)
        add(item, node);
      else
        running.push_back(node);
    }
    item.beams = running;
    item.done = item.done || is_done(item);
    for (int64_t beam = 0; beam < width_; ++beam) {
      const bool alive = !item.done && beam < static_cast<int64_t>(running.size());
      const Node dead{kRoot, 0, 0, -std::numeric_limits<double>::infinity()};
      const Node& node =
          alive ? nodes_[static_cast<size_t>(running[static_cast<size_t>(beam)])] : dead;
      step.parents.push_back(node.parent);
      step.tokens.push_back(node.token);
      step.sums.push_back(node.sum);
    }
    return fates;
  }

  void add(Item& item, int64_t node) {
    const Finished one{nodes_[static_cast<size_t>(node)].sum / weight(length_), node};
    if (static_cast<int64_t>(item.heap.size()) == width_) {
      if (!better(one, item.heap.front())) return;
      std::pop_heap(item.heap.begin(), item.heap.end(), better);
      item.heap.pop_back();
    }
    item.heap.push_back(one);
    std::push_heap(item.heap.begin(), item.heap.end(), better);
  }

  // can no running beam enter the heap any more?
  bool is_done(const Item& item) const {
    if (item.beams.empty()) return true;
    if (static_cast<int64_t>(item.heap.size()) < width_) return false;
    if (early_stopping_ == EarlyStopping::kTrue) return true;
    const bool longest = early_stopping_ == EarlyStopping::kNever && length_penalty_ > 0.0;
    double best = -std::numeric_limits<double>::infinity();
    for (int64_t beam : item.beams) best = std::max(best, nodes_[static_cast<size_t>(beam)].sum);
    return !(best / weight(longest ? max_length_ : length_) > item.heap.front().score);
  }

  double weight(int64_t length) const {
    return std::pow(static_cast<double>(length), length_penalty_);
  }

  Hypothesis path(const Finished& one) const {
    Hypothesis found;
    found.score = one.score;
    for (int64_t at = one.node; at != kRoot; at = nodes_[static_cast<size_t>(at)].previous) {
      const Node& node = nodes_[static_cast<size_t>(at)];
      found.tokens.push_back(node.token);
      found.parents.push_back(node.parent);
      found.sums.push_back(node.sum);
    }
    std::reverse(found.tokens.begin(), found.tokens.end());
    std::reverse(found.parents.begin(), found.parents.end());
    std::reverse(found.sums.begin(), found.sums.end());
    return found;
  }

  int64_t width_;
  double length_penalty_;
  EarlyStopping early_stopping_;
  int64_t min_length_, max_length_, length_ = 0;
  std::vector<Item> items_;
  std::vector<Node> nodes_;
};

}  // namespace plt
