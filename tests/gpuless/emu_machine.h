// emu_machine: the state of an emulated block, and what its threads call: barriers, warp
// operations, shared memory. emu_launch.h runs it.
//
// A lane (an emulated CUDA thread) runs on a stack of its own until it waits at a barrier or a warp
// operation, or exits. The machine and its launches belong to one thread of the process at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "emu_fiber.h"
#include "emu_races.h"
#include "emu_warp.h"

// A kernel asks for its indices all the time: not worth being watched for races.
#if defined(__SANITIZE_THREAD__)
#define EMU_UNWATCHED [[gnu::noinline, gnu::no_sanitize("thread")]]
#else
#define EMU_UNWATCHED
#endif

namespace emu {

struct Site {  // a place in the kernel's source
  const char* file = "";
  int line = 0;

  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const { return file == other.file && line == other.line; }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

enum class Barrier { kPlain, kCount, kAnd, kOr };
enum class State { kReady, kAtBarrier, kInWarpOp, kExited };

struct Lane {
  Context context;
  State state = State::kExited;
  dim3 thread;
  unsigned index = 0;  // x fastest; its warp is index / 32
  Site site;           // where it waits
  Barrier barrier = Barrier::kPlain;
  int predicate = 0;
  WarpRequest request;
  uint64_t result = 0;
};

struct SharedArray {
  const void* key;  // one for each PLT_SHARED in the source, one for dynamic memory
  char* memory;
  char* data;
};

// CUDA's numbers. Larger static arrays are refused by nvcc, larger dynamic ones must be asked for.
constexpr size_t kStaticSharedLimit = 48 << 10, kDefaultDynamicLimit = 48 << 10;
constexpr size_t kSharedLimit = 227 << 10;  // a block's maximum on sm_90 and sm_100

struct Machine {
  StackArea stacks;
  std::vector<Lane> lanes = std::vector<Lane>(StackArea::kMaxFibers);
  unsigned block_size = 0;
  Lane* running = nullptr;
  Context scheduler;
  dim3 grid, block, block_index;
  const void* call = nullptr;  // the kernel and its arguments
  void (*run_call)(const void* call) = nullptr;
  int barrier_result = 0;
  std::string fault;        // of the lane that ran last
  bool abandoning = false;  // after a fault: every lane unwinds as soon as it is switched to

  std::vector<SharedArray> shared;
  size_t static_shared_bytes = 0, dynamic_shared_bytes = 0;
  std::map<const void*, size_t> dynamic_limits;  // by kernel

  std::mt19937 random;
  bool shuffled = false;
};

EMU_UNWATCHED inline Machine& machine() {
  static Machine& machine = *new Machine;  // never destroyed: exit handlers may still launch
  return machine;
}

// 0: blocks and lanes run in the order of their index. Anything else: an order of their own, and of
// lanes another one in every round.
inline void set_seed(unsigned seed) {
  machine().random.seed(seed);
  machine().shuffled = seed != 0;
}

// ---- what a lane calls

// Unwinds a lane that waits while another lane's fault ends the launch.
struct Abandoned {};

inline void wait_for_scheduler() {
  switch_context(machine().running->context, machine().scheduler);
  if (machine().abandoning) throw Abandoned();
}

inline int block_barrier(Barrier kind, int predicate, Site site) {
  races::Unrecorded scope;
  Lane& lane = *machine().running;
  lane.state = State::kAtBarrier;
  lane.barrier = kind;
  lane.predicate = predicate != 0;
  lane.site = site;
  wait_for_scheduler();
  return machine().barrier_result;
}

inline uint64_t warp_operation(const WarpRequest& request, Site site) {
  races::Unrecorded scope;
  Lane& lane = *machine().running;
  const unsigned own = lane.index % 32;
  if (!in_mask(request.mask, own))
    throw Fault("lane " + std::to_string(own) + " is not in the mask of its own warp operation, " +
                site.text());
  lane.state = State::kInWarpOp;
  lane.request = request;
  lane.site = site;
  wait_for_scheduler();
  return lane.result;
}

inline void lane_entry() {
  Machine& m = machine();
  arrive_from(m.scheduler);
  try {
    if (!m.abandoning) m.run_call(m.call);
  } catch (const Abandoned&) {
  } catch (const std::exception& error) {
    races::record(false);
    m.fault = error.what();
  }
  races::record(false);
  m.running->state = State::kExited;
  switch_context(m.running->context, m.scheduler, true);
  __builtin_unreachable();
}

EMU_UNWATCHED inline uint3 thread_index() {
  const dim3& i = machine().running->thread;
  return {i.x, i.y, i.z};
}
EMU_UNWATCHED inline uint3 block_index() {
  const dim3& i = machine().block_index;
  return {i.x, i.y, i.z};
}
EMU_UNWATCHED inline dim3 block_dim() { return machine().block; }
EMU_UNWATCHED inline dim3 grid_dim() { return machine().grid; }

// ---- shared memory: an allocation for each array and block, so that ASan sees its ends

// It holds 0xFF bytes (NaN, -1) until written, and is aligned as its type asks and no further: a
// vector read from an array of scalars is aligned on a GPU by luck only.
inline char* new_shared_array(const void* key, size_t bytes, size_t alignment) {
  constexpr size_t kGranule = 16;
  const size_t gap = alignment < kGranule ? alignment : 0;
  const size_t size = (gap + bytes + kGranule - 1) / kGranule * kGranule;
  char* memory = static_cast<char*>(std::aligned_alloc(kGranule, size + kGranule));
  std::memset(memory, 0xff, size);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory + gap + bytes, size + kGranule - gap - bytes);
#endif
  races::forget(memory, size);
  machine().shared.push_back({key, memory, memory + gap});
  return memory + gap;
}

inline char* find_shared_array(const void* key) {
  for (const SharedArray& array : machine().shared)
    if (array.key == key) return array.data;
  return nullptr;
}

inline void require_shared(size_t bytes, size_t limit, const char* what) {
  if (bytes > limit)
    throw Fault(std::to_string(bytes) + " bytes of " + what + " in a block, the limit is " +
                std::to_string(limit));
}

inline char* static_array(const void* key, size_t bytes, size_t alignment) {
  races::Unrecorded scope;
  if (char* data = find_shared_array(key)) return data;
  Machine& m = machine();
  m.static_shared_bytes += bytes;
  require_shared(m.static_shared_bytes, kStaticSharedLimit, "static shared memory");
  require_shared(m.static_shared_bytes + m.dynamic_shared_bytes, kSharedLimit, "shared memory");
  return new_shared_array(key, bytes, alignment);
}

template <class T, size_t N>
auto static_shared(const void* key) -> T (&)[N] {
  return *reinterpret_cast<T(*)[N]>(static_array(key, sizeof(T[N]), alignof(T)));
}

inline void* dynamic_shared() {
  races::Unrecorded scope;
  static const char key = 0;
  if (char* data = find_shared_array(&key)) return data;
  return new_shared_array(&key, machine().dynamic_shared_bytes, 16);
}

inline void free_shared_arrays() {
  Machine& m = machine();
  for (const SharedArray& array : m.shared) std::free(array.memory);
  m.shared.clear();
  m.static_shared_bytes = 0;
}

}  // namespace emu
