// cuda_on_cpu: with this included before them, CUDA C++ kernels are functions that run on the CPU.
//
//   #include "cuda_on_cpu.h"
//   #include "cuda/<word>.cuh"
//   extern "C" int softmax_f32(const float* x, float* y, int64_t rows, int64_t columns) {
//     return emu::guarded([&] { launch_softmax(x, y, rows, columns, /*stream=*/nullptr); });
//   }
//
// One fiber for each CUDA thread, blocks one after another (emu_launch.h); built plain, with
// ASan+UBSan or with a race detector (emu_races.h) by emulator.py. Finds: wrong results, reads and
// writes out of bounds in global and shared memory, misaligned vectors, undefined behaviour, data
// races in a block and between blocks, hand-overs without a fence, divergent barriers, bad shuffle
// masks, shared memory and locals that are read before they are written, launches that a GPU
// refuses, and, by several seeds, results that depend on the order of threads.
//
// Cannot find: what nvcc and ptxas make of the source, errors of approximate instructions, time;
// a fence missing after the atomic by which a thread takes over; blocks above __launch_bounds__.
// Cannot run: inline PTX, CUB, cooperative groups, cp.async, TMA, tensor cores, and threads that
// spin on one another: they hang. A float out of an integer's range converts as on x86.
//
// For the compile gates nvcc compiles the same driver: guarded() is all that it needs from here.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <type_traits>

#ifdef __CUDACC__

namespace emu {
template <class Body>
int guarded(Body&& body) {
  body();
  return 0;
}
}  // namespace emu

#else

#include "emu_cuda.h"
#include "emu_runtime.h"

namespace emu {

inline std::string& last_fault() {
  static std::string& message = *new std::string;
  return message;
}

// Runs the body of a driver's entry. Returns 0, or 1 with the message in emu_last_fault().
template <class Body>
int guarded(Body&& body) {
  try {
    if constexpr (std::is_same_v<decltype(body()), cudaError_t>) {
      if (const cudaError_t error = body(); error != cudaSuccess)
        throw Fault("the launcher returned CUDA error " + std::to_string(int(error)));
    } else {
      body();
    }
    return 0;
  } catch (const std::exception& error) {
    last_fault() = error.what();
    return 1;
  }
}

}  // namespace emu

extern "C" __attribute__((weak)) const char* emu_last_fault() { return emu::last_fault().c_str(); }
extern "C" __attribute__((weak)) void emu_set_seed(unsigned seed) { emu::set_seed(seed); }

#endif
