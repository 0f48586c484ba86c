// emu_races: tells which accesses of two threads nothing orders. Only in the flavour "tsan".
//
// g++ -fsanitize=thread calls a function at every load and store of a kernel; emu_races.cpp defines
// those functions, instead of the library that usually does. ThreadSanitizer's own library has 255
// slots for threads and forgets finished ones: of races between blocks it missed more than half.
//
// What orders: __syncthreads; __syncwarp; and atomics of two threads on one word, for what came
// before a fence of the first one, or before a fence and a barrier that the first one then passed.
// A shuffle orders nothing, as in CUDA's model.
#pragma once

#include <cstddef>

namespace emu::races {

#if defined(__SANITIZE_THREAD__)

// Everything before the launch is ordered before it. `stacks`: where the stacks of all lanes lie.
void begin_launch(unsigned block_size, const void* stacks, size_t stacks_bytes);
void begin_block(unsigned block);
// From now on accesses are those of `lane`, whose own stack is not watched.
void run(unsigned lane, const void* stack, size_t stack_bytes);
// Whether accesses count; they do while a kernel's own code runs. Returns what was set before.
bool record(bool on);

void order(const unsigned* lanes,
           size_t count);  // what each did before is before what any does next
void fence(bool of_device);
void atomic(const void* address, size_t bytes);
void forget(const void* address, size_t bytes);  // new memory, which nobody has touched

const char* found();  // the first race of the launch, or null

#else

inline void begin_launch(unsigned, const void*, size_t) {}
inline void begin_block(unsigned) {}
inline void run(unsigned, const void*, size_t) {}
inline bool record(bool) { return false; }
inline void order(const unsigned*, size_t) {}
inline void fence(bool) {}
inline void atomic(const void*, size_t) {}
inline void forget(const void*, size_t) {}
inline const char* found() { return nullptr; }

#endif

// While one lives, the emulator is at work and not the kernel.
struct Unrecorded {
  Unrecorded() : before(record(false)) {}
  ~Unrecorded() { record(before); }
  Unrecorded(const Unrecorded&) = delete;
  const bool before;
};

}  // namespace emu::races
