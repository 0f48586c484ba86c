// emu_races: a vector-clock race detector for emulated CUDA threads, called by instrumented code.
//
// A thread's epoch counts its releases. Its knowledge is, for every thread, the last epoch that is
// ordered before what it does now. An access is remembered with the thread's epoch; a later access
// is ordered after it if its thread knows that epoch. Exact for the accesses that were executed:
// a pair that nothing orders is found whatever the order in which the two happened to run.
//
// Compiled without instrumentation.
#define __SANITIZE_THREAD__ 1  // the declarations of this flavour
#include "emu_races.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emu::races {
namespace {

using Epoch = uint32_t;

struct Thread {
  unsigned block, lane;
  bool operator==(const Thread& other) const { return block == other.block && lane == other.lane; }
};

class Knowledge {
 public:
  void add(Thread thread, Epoch epoch, unsigned block_size) {
    auto& epochs = of_block_[thread.block];
    epochs.resize(block_size);
    epochs[thread.lane] = std::max(epochs[thread.lane], epoch);
  }
  void add(const Knowledge& other) {
    for (const auto& [block, theirs] : other.of_block_) {
      auto& ours = of_block_[block];
      ours.resize(theirs.size());
      for (size_t i = 0; i < theirs.size(); ++i) ours[i] = std::max(ours[i], theirs[i]);
    }
  }
  bool holds(Thread thread, Epoch epoch) const {
    const auto epochs = of_block_.find(thread.block);
    return epochs != of_block_.end() && epochs->second[thread.lane] >= epoch;
  }

 private:
  std::map<unsigned, std::vector<Epoch>> of_block_;  // few: blocks meet through atomics only
};

struct Lane {
  Epoch epoch = 1;
  Knowledge knowledge;
  Knowledge at_device_fence, at_block_fence;  // what fences have made visible to others
};

enum class Kind { kRead, kWrite, kAtomic };

struct Access {
  Thread thread;
  Epoch epoch;
  const void* code;
};

// What happened to some bytes; accesses that are ordered before a later one of their kind are gone.
struct Cell {
  std::vector<Access> of_kind[3];
};

constexpr uintptr_t kPageBytes = 4096;

struct Page {
  unsigned unit = 4;  // bytes of a cell: the smallest access to the page, so far
  std::vector<Cell> cells = std::vector<Cell>(kPageBytes / 4);

  void split(unsigned smaller) {
    std::vector<Cell> finer;
    for (const Cell& cell : cells) finer.insert(finer.end(), unit / smaller, cell);
    cells = std::move(finer);
    unit = smaller;
  }
};

// What lanes have published at an address by atomics.
struct Message {
  Knowledge of_device, of_block;
  unsigned block = 0;  // whose of_block it is
};

struct Detector {
  bool recording = false;
  unsigned block_size = 0, block = 0;
  uintptr_t stacks = 0, stacks_end = 0, own_stack = 0, own_stack_end = 0;
  unsigned lane = 0;
  std::vector<Lane> lanes;
  std::unordered_map<uintptr_t, Page> pages;
  std::unordered_map<const void*, Message> messages;
  std::string race;
};

Detector& detector() {
  static Detector& detector = *new Detector;
  return detector;
}

const char* verb(Kind kind) {
  return kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic";
}

// The place in the library as {0x...}, which emulator.py turns into a line.
std::string describe(Kind kind, const Access& access) {
  Dl_info library;
  if (!dladdr(access.code, &library)) library.dli_fbase = nullptr;
  char text[128];
  std::snprintf(
      text, sizeof text, "%s by block %u thread %u at {0x%zx}", verb(kind), access.thread.block,
      access.thread.lane,
      static_cast<const char*>(access.code) - static_cast<const char*>(library.dli_fbase));
  return text;
}

void report(const std::string& message) {
  if (detector().race.empty()) detector().race = message;
}

bool conflict(Kind a, Kind b) {
  if (a == Kind::kAtomic && b == Kind::kAtomic) return false;
  return a != Kind::kRead || b != Kind::kRead;
}

void touch(Cell& cell, Kind kind, const Access& access) {
  const Knowledge& knowledge = detector().lanes[access.thread.lane].knowledge;
  const auto is_before = [&](const Access& earlier) {
    return earlier.thread == access.thread || knowledge.holds(earlier.thread, earlier.epoch);
  };
  for (Kind other : {Kind::kRead, Kind::kWrite, Kind::kAtomic}) {
    if (!conflict(kind, other)) continue;
    for (const Access& earlier : cell.of_kind[int(other)]) {
      if (!is_before(earlier))
        report("race: " + describe(kind, access) + ", and " + describe(other, earlier));
    }
  }
  auto& same = cell.of_kind[int(kind)];
  same.erase(std::remove_if(same.begin(), same.end(), is_before), same.end());
  same.push_back(access);
}

void access(Kind kind, const void* pointer, size_t bytes, const void* code) {
  Detector& d = detector();
  if (!d.recording || bytes == 0) return;
  const Unrecorded scope;  // the linker may have taken a driver's, instrumented, std::vector
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const Access now{{d.block, d.lane}, d.lanes[d.lane].epoch, code};
  if (address >= d.stacks && address < d.stacks_end) {
    if (address < d.own_stack || address >= d.own_stack_end)
      report("another thread's local variable: " + describe(kind, now));
    return;
  }
  const uintptr_t common = address | bytes;
  const unsigned unit = common % 4 == 0 ? 4 : common % 2 == 0 ? 2 : 1;
  for (uintptr_t at = address; at < address + bytes;) {
    Page& page = d.pages[at / kPageBytes];
    if (page.unit > unit) page.split(unit);
    touch(page.cells[at % kPageBytes / page.unit], kind, now);
    at += page.unit;
  }
}

}  // namespace

void begin_launch(unsigned block_size, const void* stacks, size_t stacks_bytes) {
  Detector& d = detector();
  d.block_size = block_size;
  d.stacks = reinterpret_cast<uintptr_t>(stacks);
  d.stacks_end = d.stacks + stacks_bytes;
  d.pages.clear();
  d.messages.clear();
  d.race.clear();
}

void begin_block(unsigned block) {
  detector().block = block;
  detector().lanes.assign(detector().block_size, Lane());
}

void run(unsigned lane, const void* stack, size_t stack_bytes) {
  Detector& d = detector();
  d.lane = lane;
  d.own_stack = reinterpret_cast<uintptr_t>(stack);
  d.own_stack_end = d.own_stack + stack_bytes;
}

bool record(bool on) { return std::exchange(detector().recording, on); }

void order(const unsigned* lanes, size_t count) {
  Detector& d = detector();
  Lane common;
  for (size_t i = 0; i < count; ++i) {
    Lane& lane = d.lanes[lanes[i]];
    common.knowledge.add(lane.knowledge);
    common.knowledge.add({d.block, lanes[i]}, lane.epoch++, d.block_size);
    common.at_device_fence.add(lane.at_device_fence);
    common.at_block_fence.add(lane.at_block_fence);
  }
  for (size_t i = 0; i < count; ++i) {
    common.epoch = d.lanes[lanes[i]].epoch;
    d.lanes[lanes[i]] = common;
  }
}

void fence(bool of_device) {
  const Unrecorded scope;
  Detector& d = detector();
  Lane& lane = d.lanes[d.lane];
  lane.at_block_fence = lane.knowledge;
  lane.at_block_fence.add({d.block, d.lane}, lane.epoch++, d.block_size);
  if (of_device) lane.at_device_fence = lane.at_block_fence;
}

void atomic(const void* address, size_t bytes) {
  Detector& d = detector();
  access(Kind::kAtomic, address, bytes, __builtin_return_address(0));
  const Unrecorded scope;
  Lane& lane = d.lanes[d.lane];
  Message& message = d.messages[address];
  lane.knowledge.add(message.of_device);
  message.of_device.add(lane.at_device_fence);
  if (message.block != d.block) message.of_block = Knowledge();
  message.block = d.block;
  lane.knowledge.add(message.of_block);
  message.of_block.add(lane.at_block_fence);
}

void forget(const void* address, size_t bytes) {
  Detector& d = detector();
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  for (uintptr_t at = begin; at < end;) {
    const auto page = d.pages.find(at / kPageBytes);
    if (page == d.pages.end()) {
      at = (at / kPageBytes + 1) * kPageBytes;
      continue;
    }
    page->second.cells[at % kPageBytes / page->second.unit] = Cell();
    at += page->second.unit;
  }
  for (auto message = d.messages.begin(); message != d.messages.end();) {
    const auto at = reinterpret_cast<uintptr_t>(message->first);
    message = at >= begin && at < end ? d.messages.erase(message) : std::next(message);
  }
}

const char* found() { return detector().race.empty() ? nullptr : detector().race.c_str(); }

}  // namespace emu::races

// ---- what instrumented code calls

using emu::races::access;
using emu::races::Kind;

#define EMU_HOOK(name, kind, bytes)                                  \
  extern "C" void name(void* address) {                              \
    access(Kind::kind, address, bytes, __builtin_return_address(0)); \
  }
#define EMU_HOOKS(bytes)                               \
  EMU_HOOK(__tsan_read##bytes, kRead, bytes)           \
  EMU_HOOK(__tsan_write##bytes, kWrite, bytes)         \
  EMU_HOOK(__tsan_unaligned_read##bytes, kRead, bytes) \
  EMU_HOOK(__tsan_unaligned_write##bytes, kWrite, bytes)
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)

extern "C" void __tsan_read_range(void* address, size_t bytes) {
  access(Kind::kRead, address, bytes, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  access(Kind::kWrite, address, bytes, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// The compiler does not report what these functions touch. Compiled with -fno-builtin-memcpy and so
// on, kernels call them here. Named by their symbols, since string.h has declared them otherwise.
#define EMU_SYMBOL(name) asm(name) __attribute__((visibility("hidden")))

extern "C" void* emu_copy(void* to, const void* from, size_t bytes) EMU_SYMBOL("memcpy");
extern "C" void* emu_move(void* to, const void* from, size_t bytes) EMU_SYMBOL("memmove");
extern "C" void* emu_fill(void* to, int value, size_t bytes) EMU_SYMBOL("memset");

extern "C" void* emu_copy(void* to, const void* from, size_t bytes) {
  access(Kind::kRead, from, bytes, __builtin_return_address(0));
  access(Kind::kWrite, to, bytes, __builtin_return_address(0));
  void* end = to;
  asm volatile("rep movsb" : "+D"(end), "+S"(from), "+c"(bytes) : : "memory");
  return to;
}
extern "C" void* emu_move(void* to, const void* from, size_t bytes) {
  if (to <= from || static_cast<const char*>(from) + bytes <= to) return emu_copy(to, from, bytes);
  access(Kind::kRead, from, bytes, __builtin_return_address(0));
  access(Kind::kWrite, to, bytes, __builtin_return_address(0));
  void* last = static_cast<char*>(to) + bytes - 1;
  from = static_cast<const char*>(from) + bytes - 1;
  asm volatile("std; rep movsb; cld" : "+D"(last), "+S"(from), "+c"(bytes) : : "memory");
  return to;
}
extern "C" void* emu_fill(void* to, int value, size_t bytes) {
  access(Kind::kWrite, to, bytes, __builtin_return_address(0));
  void* end = to;
  asm volatile("rep stosb" : "+D"(end), "+c"(bytes) : "a"(value) : "memory");
  return to;
}
