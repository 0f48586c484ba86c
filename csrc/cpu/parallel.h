// parallel: torch's own thread pool, made visible to ThreadSanitizer.
//
// libtorch and its OpenMP runtime are not instrumented, so TSan cannot see that the pool starts
// after the caller and ends before it goes on. Under TSan these two orders are declared by hand,
// and nothing else: two workers that touch the same memory are still a race.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define PLT_TSAN(call) call
#else
#define PLT_TSAN(call) (void)0
#endif

namespace pyllmtune {

// f(begin, end) over a partition of [0, count) with parts of at least `grain`.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  // static, not captured: a worker acquires before it reads the closure
  [[maybe_unused]] static char fork, join;
  const auto body = [&](int64_t begin, int64_t end) {
    PLT_TSAN(__tsan_acquire(&fork));
    f(begin, end);
    PLT_TSAN(__tsan_release(&join));
  };
  PLT_TSAN(__tsan_release(&fork));
  torch::stable::parallel_for(0, count, grain, body);
  PLT_TSAN(__tsan_acquire(&join));
}

}  // namespace pyllmtune
