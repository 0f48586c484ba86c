// emu_launch: the scheduler of one block, and the launch of a grid.
//
//   launch(kernel, grid, block, dynamic_bytes, stream, arguments...)
//
// Blocks run one after another. In a round every lane that can run does so; then each warp
// operation is completed whose whole mask has arrived, and the block barrier once every living lane
// has. No progress: deadlock. The seed draws the order of blocks and, in every round, of lanes.
// A launch that a GPU would refuse is a fault, like a kernel's mistake; faults are exceptions of
// type emu::Fault, thrown from launch().
#pragma once

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "emu_machine.h"

namespace emu {

inline std::string text(dim3 d) {
  return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
}

inline std::string describe_waiting() {
  constexpr int kGroups = 4;  // enough to see who waits for whom
  std::string text;
  Machine& m = machine();
  const Lane* previous = nullptr;
  for (unsigned i = 0, groups = 0; i < m.block_size && groups < kGroups; ++i) {
    const Lane& lane = m.lanes[i];
    if (lane.state == State::kExited) continue;
    const bool repeats = previous && previous->state == lane.state && previous->site == lane.site;
    previous = &lane;
    if (repeats) continue;
    ++groups;
    char mask[24] = "";
    if (lane.state == State::kInWarpOp)
      snprintf(mask, sizeof mask, ", mask %08x", lane.request.mask);
    text += "; from thread " + std::to_string(i) + " on: " +
            (lane.state == State::kAtBarrier ? "block barrier at " : "warp operation at ") +
            lane.site.text() + mask;
  }
  return text;
}

inline void run_lane(Lane& lane) {
  Machine& m = machine();
  m.running = &lane;
  races::run(lane.index, lane.context.stack_bottom, lane.context.stack_bytes);
  switch_context(m.scheduler, lane.context);
  if (!m.fault.empty()) throw Fault(m.fault + ", thread " + std::to_string(lane.index));
  if (const char* race = races::found()) throw Fault(race);
}

inline bool run_ready_lanes(const std::vector<unsigned>& order) {
  bool progress = false;
  for (unsigned i : order) {
    if (machine().lanes[i].state != State::kReady) continue;
    run_lane(machine().lanes[i]);
    progress = true;
  }
  return progress;
}

// True if every lane of the mask waits for the same operation as `lane`.
inline bool mask_has_arrived(const Lane* warp, unsigned mask, const Lane& lane) {
  for (unsigned j = 0; j < 32; ++j) {
    if (!in_mask(mask, j)) continue;
    const Lane& other = warp[j];
    if (other.state == State::kExited)
      throw Fault("warp operation at " + lane.site.text() + " names lane " + std::to_string(j) +
                  ", which has exited");
    if (other.state != State::kInWarpOp || other.request.op != lane.request.op ||
        other.request.mask != lane.request.mask || !(other.site == lane.site))
      return false;
  }
  return true;
}

inline void complete_warp_operation(Lane* warp, unsigned mask, const Lane& lane) {
  const auto request_of = [warp](unsigned j) -> const WarpRequest& { return warp[j].request; };
  unsigned lanes[32], count = 0;
  for (unsigned j = 0; j < 32; ++j)
    if (in_mask(mask, j)) lanes[count++] = j;
  try {
    for (unsigned i = 0; i < count; ++i)
      warp[lanes[i]].result = warp_result(request_of, mask, lanes[i]);
  } catch (const Fault& fault) {
    throw Fault(fault.what() + (", " + lane.site.text()));
  }
  for (unsigned i = 0; i < count; ++i) {
    warp[lanes[i]].state = State::kReady;
    lanes[i] = warp[lanes[i]].index;
  }
  if (lane.request.op == WarpOp::kSync) races::order(lanes, count);
}

inline bool complete_warp_operations() {
  Machine& m = machine();
  bool progress = false;
  for (unsigned first = 0; first < m.block_size; first += 32) {
    Lane* warp = &m.lanes[first];
    const unsigned lanes = std::min(32u, m.block_size - first);
    const unsigned existing = lanes == 32 ? ~0u : (1u << lanes) - 1;
    for (unsigned i = 0; i < lanes; ++i) {
      if (warp[i].state != State::kInWarpOp) continue;
      const unsigned mask = warp[i].request.mask & existing;
      if (!mask_has_arrived(warp, mask, warp[i])) continue;
      complete_warp_operation(warp, mask, warp[i]);
      progress = true;
    }
  }
  return progress;
}

inline int barrier_result(Barrier kind, size_t waiting, size_t true_predicates) {
  switch (kind) {
    case Barrier::kCount:
      return static_cast<int>(true_predicates);
    case Barrier::kAnd:
      return true_predicates == waiting;
    case Barrier::kOr:
      return true_predicates > 0;
    default:
      return 0;
  }
}

// Exited threads do not count, as on the hardware.
inline bool complete_block_barrier(unsigned living) {
  Machine& m = machine();
  std::vector<unsigned> waiting;
  size_t true_predicates = 0;
  for (unsigned i = 0; i < m.block_size; ++i) {
    if (m.lanes[i].state != State::kAtBarrier) continue;
    waiting.push_back(i);
    true_predicates += m.lanes[i].predicate;
  }
  if (waiting.empty() || waiting.size() < living) return false;
  const Lane& first = m.lanes[waiting[0]];
  for (unsigned i : waiting)
    if (!(m.lanes[i].site == first.site))
      throw Fault("threads of one block wait at different barriers" + describe_waiting());
  m.barrier_result = barrier_result(first.barrier, waiting.size(), true_predicates);
  races::order(waiting.data(), waiting.size());
  for (unsigned i : waiting) m.lanes[i].state = State::kReady;
  return true;
}

inline unsigned count_living() {
  Machine& m = machine();
  return static_cast<unsigned>(
      std::count_if(m.lanes.begin(), m.lanes.begin() + m.block_size,
                    [](const Lane& lane) { return lane.state != State::kExited; }));
}

inline void start_lanes() {
  Machine& m = machine();
  for (unsigned i = 0; i < m.block_size; ++i) {
    Lane& lane = m.lanes[i];
    lane.state = State::kReady;
    lane.index = i;
    lane.thread = dim3(i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y));
    m.stacks.start(lane.context, i, &lane_entry);
  }
}

inline void run_rounds() {
  Machine& m = machine();
  std::vector<unsigned> order(m.block_size);
  std::iota(order.begin(), order.end(), 0u);
  while (const unsigned living = count_living()) {
    if (m.shuffled) std::shuffle(order.begin(), order.end(), m.random);
    bool progress = run_ready_lanes(order);
    progress |= complete_warp_operations();
    progress |= complete_block_barrier(count_living());
    if (!progress)
      throw Fault("deadlock of " + std::to_string(living) + " threads" + describe_waiting());
  }
}

// After a fault some lanes still wait: each is switched to once more, and unwinds.
inline void finish_block() {
  Machine& m = machine();
  m.abandoning = true;
  for (unsigned i = 0; i < m.block_size; ++i) {
    m.running = &m.lanes[i];
    if (m.running->state != State::kExited) switch_context(m.scheduler, m.running->context);
  }
  m.abandoning = false;
  free_shared_arrays();
}

inline void run_block() {
  start_lanes();
  try {
    run_rounds();
  } catch (const Fault& fault) {
    finish_block();
    const dim3& b = machine().block_index;
    throw Fault(fault.what() + (" (block " + std::to_string(b.x) + ", " + std::to_string(b.y)) +
                ", " + std::to_string(b.z) + ")");
  }
  finish_block();
}

inline size_t dynamic_limit(const void* kernel) {
  const auto found = machine().dynamic_limits.find(kernel);
  return found == machine().dynamic_limits.end() ? kDefaultDynamicLimit : found->second;
}

// What makes a launch return cudaErrorInvalidValue or cudaErrorInvalidConfiguration.
inline void check_launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64)
    throw Fault("launch with a block of " + text(block) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Fault("launch with a grid of " + text(grid) + " blocks");
  require_shared(dynamic_bytes, dynamic_limit(kernel),
                 "dynamic shared memory (see cudaFuncSetAttribute)");
}

// Keeps a parameter out of template deduction: arguments convert as in any call.
template <class T>
struct Plain {
  using Type = T;
};

inline void run_grid() {
  Machine& m = machine();
  std::vector<uint64_t> order(uint64_t(m.grid.x) * m.grid.y * m.grid.z);
  std::iota(order.begin(), order.end(), uint64_t(0));
  if (m.shuffled) std::shuffle(order.begin(), order.end(), m.random);
  for (uint64_t i : order) {
    m.block_index =
        dim3(i % m.grid.x, i / m.grid.x % m.grid.y, i / (uint64_t(m.grid.x) * m.grid.y));
    races::begin_block(static_cast<unsigned>(i));
    run_block();
  }
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes,
            cudaStream_t, typename Plain<Parameters>::Type... arguments) {
  Machine& m = machine();
  check_launch(reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes);
  const auto call = [=] { kernel(arguments...); };
  m.call = &call;
  m.run_call = [](const void* shared_call) {
    const auto own_call = *static_cast<decltype(&call)>(shared_call);  // parameters are local
    races::record(true);
    own_call();
  };
  m.grid = grid;
  m.block = block;
  m.block_size = block.x * block.y * block.z;
  m.dynamic_shared_bytes = dynamic_bytes;
  m.fault.clear();
  races::begin_launch(m.block_size, m.stacks.base(), StackArea::kBytes);
  run_grid();
}

}  // namespace emu
