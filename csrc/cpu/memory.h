// memory: a large result that starts as zeros without anyone writing them.
//
// Anonymous memory of the operating system is zero when first touched, and costs nothing until
// then. So a gradient whose rows are mostly zero is paid for by the rows that are not. Large pages
// divide the number of page faults, which are most of the time of writing fresh memory, by 512.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#include <sys/mman.h>
#define PLT_FRESH_PAGES 1
#endif

namespace pyllmtune {

struct FreshTensor {
  torch::stable::Tensor tensor;  // contiguous
  bool is_zero;
};

// How much of the new memory will be written: of large pages, each is cleared whole when it is
// touched.
enum class Touched { kMost, kLittle };

// The shape of `like`, in a dtype with `element_size` bytes an element.
inline FreshTensor fresh_like(const torch::stable::Tensor& like,
                              torch::headeronly::ScalarType dtype, size_t element_size,
                              Touched touched = Touched::kMost) {
  const auto sizes = like.sizes();
#ifdef PLT_FRESH_PAGES
  const size_t bytes = like.numel() * element_size;
  // 1 MiB: below it the allocator's recycled memory is faster than new pages
  if (bytes >= (1u << 20)) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(pages != MAP_FAILED, "out of memory: ", bytes,
                    " bytes for a result of the size of an input");
    // a hint: without it, or without support, only slower
    madvise(pages, bytes, touched == Touched::kMost ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
    return {torch::stable::from_blob(pages, sizes, {strides.data(), strides.size()}, like.device(),
                                     dtype, [bytes](void* p) { munmap(p, bytes); }),
            true};
  }
#endif
  return {torch::stable::new_empty(like, sizes, dtype), false};
}
inline FreshTensor fresh_like(const torch::stable::Tensor& like, Touched touched = Touched::kMost) {
  return fresh_like(like, like.scalar_type(), like.element_size(), touched);
}

template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p);
}

}  // namespace pyllmtune
