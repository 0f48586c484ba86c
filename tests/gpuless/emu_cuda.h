// emu_cuda: CUDA's spelling of what emu_machine.h and emu_launch.h do, and device intrinsics.
//
// Arithmetic is libm's: __expf is expf, so the last bits differ from a GPU's approximate
// instructions. Types and conversions of half and bfloat16 come from CUDA's own headers, which
// compile for the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include <cmath>

#include "emu_launch.h"

#undef __shared__
#define __shared__ emu_error_declare_shared_arrays_with_PLT_SHARED
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_dim())
#define gridDim (emu::grid_dim())
#define warpSize 32

// A finding then has the kernel's line, not one of this file.
#define EMU_INLINE inline __attribute__((always_inline))

// ---- the three macros of a kernel's source; for nvcc the project's block.cuh has them

#define PLT_SHARED(T, name, N) \
  static char name##_key;      \
  T(&name)[N] = emu::static_shared<T, N>(&name##_key)
#define PLT_DYN_SHARED(T, name) T* name = static_cast<T*>(emu::dynamic_shared())
#define PLT_LAUNCH(kernel, grid, block, smem, stream, ...) \
  emu::launch(kernel, grid, block, smem, stream, ##__VA_ARGS__)

// ---- barriers and fences

#define EMU_SITE emu::Site site = emu::Site::here()

inline void __syncthreads(EMU_SITE) { emu::block_barrier(emu::Barrier::kPlain, 0, site); }
inline int __syncthreads_count(int p, EMU_SITE) {
  return emu::block_barrier(emu::Barrier::kCount, p, site);
}
inline int __syncthreads_and(int p, EMU_SITE) {
  return emu::block_barrier(emu::Barrier::kAnd, p, site);
}
inline int __syncthreads_or(int p, EMU_SITE) {
  return emu::block_barrier(emu::Barrier::kOr, p, site);
}
inline void __syncwarp(unsigned mask = ~0u, EMU_SITE) {
  emu::warp_operation({emu::WarpOp::kSync, mask}, site);
}
inline void __threadfence() { emu::races::fence(true); }
inline void __threadfence_block() { emu::races::fence(false); }
[[noreturn]] inline void __trap() { throw emu::Fault("__trap"); }

// ---- warp operations

namespace emu {

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8, "warp operations move at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(WarpOp op, unsigned mask, T value, unsigned operand, unsigned width, Site site) {
  return from_bits<T>(warp_operation({op, mask, bits_of(value), operand, width}, site));
}

inline unsigned ballot(unsigned mask, bool predicate, Site site) {
  return static_cast<unsigned>(warp_operation({WarpOp::kBallot, mask, predicate}, site));
}

inline unsigned reduce(WarpOp op, unsigned mask, unsigned value, Site site) {
  return static_cast<unsigned>(warp_operation({op, mask, value}, site));
}

}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_SITE) {
  return emu::shuffle(emu::WarpOp::kShuffle, mask, value, source, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, EMU_SITE) {
  return emu::shuffle(emu::WarpOp::kShuffleUp, mask, value, distance, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, EMU_SITE) {
  return emu::shuffle(emu::WarpOp::kShuffleDown, mask, value, distance, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMU_SITE) {
  return emu::shuffle(emu::WarpOp::kShuffleXor, mask, value, lanes, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int p, EMU_SITE) {
  return emu::ballot(mask, p != 0, site);
}
inline int __any_sync(unsigned mask, int p, EMU_SITE) {
  return emu::ballot(mask, p != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int p, EMU_SITE) {
  return emu::ballot(mask, p == 0, site) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMU_SITE) {
  return static_cast<unsigned>(
      emu::warp_operation({emu::WarpOp::kMatchAny, mask, emu::bits_of(value)}, site));
}

#define EMU_REDUCE(name, T, op)                                                                    \
  inline T name(unsigned mask, T value, EMU_SITE) {                                                \
    return static_cast<T>(emu::reduce(emu::WarpOp::op, mask, static_cast<unsigned>(value), site)); \
  }
EMU_REDUCE(__reduce_add_sync, unsigned, kReduceAdd)
EMU_REDUCE(__reduce_add_sync, int, kReduceAdd)
EMU_REDUCE(__reduce_min_sync, unsigned, kReduceMinUnsigned)
EMU_REDUCE(__reduce_min_sync, int, kReduceMinSigned)
EMU_REDUCE(__reduce_max_sync, unsigned, kReduceMaxUnsigned)
EMU_REDUCE(__reduce_max_sync, int, kReduceMaxSigned)
EMU_REDUCE(__reduce_and_sync, unsigned, kReduceAnd)
EMU_REDUCE(__reduce_or_sync, unsigned, kReduceOr)
EMU_REDUCE(__reduce_xor_sync, unsigned, kReduceXor)
#undef EMU_REDUCE
#undef EMU_SITE

// ---- atomics: lanes take turns, so that nothing else is needed to make them so

namespace emu {

template <class T, class Next>
EMU_INLINE T atomic_update(T* address, Next next) {
  races::atomic(address, sizeof(T));
  races::Unrecorded scope;
  const T old = *address;
  *address = next(old);
  return old;
}

}  // namespace emu

#define EMU_ATOMIC(name, expression)                                                               \
  template <class T>                                                                               \
  EMU_INLINE T name(T* address, typename emu::Plain<T>::Type value) {                              \
    return emu::atomic_update(address, [value]([[maybe_unused]] T old) { return T(expression); }); \
  }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicMin, old < value ? old : value)
EMU_ATOMIC(atomicMax, old > value ? old : value)
EMU_ATOMIC(atomicExch, value)
EMU_ATOMIC(atomicAnd, (old & value))
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicXor, old ^ value)
EMU_ATOMIC(atomicInc, old >= value ? T(0) : old + 1)
EMU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef EMU_ATOMIC
template <class T>
EMU_INLINE T atomicCAS(T* address, typename emu::Plain<T>::Type expected,
                       typename emu::Plain<T>::Type value) {
  return emu::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

// ---- loads and stores with a cache hint

#define EMU_LOAD(name)                  \
  template <class T>                    \
  EMU_INLINE T name(const T* address) { \
    return *address;                    \
  }
EMU_LOAD(__ldg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldcv)
EMU_LOAD(__ldlu)
#undef EMU_LOAD
#define EMU_STORE(name)                                                  \
  template <class T>                                                     \
  EMU_INLINE void name(T* address, typename emu::Plain<T>::Type value) { \
    *address = value;                                                    \
  }
EMU_STORE(__stcg)
EMU_STORE(__stcs)
EMU_STORE(__stwb)
EMU_STORE(__stwt)
#undef EMU_STORE

// ---- arithmetic

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
inline int __clzll(long long a) {
  return a ? __builtin_clzll(static_cast<unsigned long long>(a)) : 64;
}
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }

inline unsigned __float_as_uint(float x) { return emu::from_bits<unsigned>(emu::bits_of(x)); }
inline int __float_as_int(float x) { return emu::from_bits<int>(emu::bits_of(x)); }
inline float __uint_as_float(unsigned x) { return emu::from_bits<float>(x); }
inline float __int_as_float(int x) { return emu::from_bits<float>(unsigned(x)); }
inline long long __double_as_longlong(double x) {
  return emu::from_bits<long long>(emu::bits_of(x));
}
inline double __longlong_as_double(long long x) { return emu::from_bits<double>(emu::bits_of(x)); }

// nvcc has these in the global namespace for every arithmetic type; of floats they drop a NaN.
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}
