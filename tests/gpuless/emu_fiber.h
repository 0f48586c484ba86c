// emu_fiber: a stack for each emulated CUDA thread, and the switch between stacks.
//
//   switch_context(from, to)   leaves `from`, continues `to`, returns on a switch back to `from`
//
// The switch saves the six registers that the x86-64 calling convention preserves: about 50 ns.
// ASan is told of it, because it must know the bounds of the stack in use.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "the stack switch of this emulator is written for x86-64 Linux"
#endif

#include <sys/mman.h>

#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// A weak symbol, so that a library may be made of several translation units.
extern "C" void emu_switch_stack(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
    .pushsection .text.emu_switch_stack, "axG", @progbits, emu_switch_stack, comdat
    .weak emu_switch_stack
    .type emu_switch_stack, @function
emu_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emu_switch_stack, . - emu_switch_stack
    .popsection
)");

namespace emu {

struct Context {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
};

inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool from_ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.asan_fake_stack, to.stack_bottom,
                                 to.stack_bytes);
#endif
  emu_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

// The first thing to call on a fresh stack. ASan tells here where the caller's own stack lies.
inline void arrive_from([[maybe_unused]] Context& caller) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &caller.stack_bottom, &caller.stack_bytes);
#endif
}

// Stacks for the largest block, each above an unmapped page: an overrun is a crash at once.
class StackArea {
 public:
  static constexpr unsigned kMaxFibers = 1024;
  static constexpr size_t kStackBytes = 64 << 10, kGuardBytes = 4096,
                          kSlotBytes = kStackBytes + kGuardBytes, kBytes = kSlotBytes * kMaxFibers;

  StackArea() {
    void* area =
        mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(area);
    for (unsigned i = 0; i < kMaxFibers; ++i)
      mprotect(stack(i), kStackBytes, PROT_READ | PROT_WRITE);
  }

  const void* base() const { return base_; }

  // Makes `context` start `entry` on stack `index` when it is next switched to.
  void start(Context& context, unsigned index, void (*entry)()) {
    char* bottom = stack(index);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom, kStackBytes);  // red zones of the block before
#endif
    void** top = reinterpret_cast<void**>(bottom + kStackBytes);
    *--top = nullptr;  // the return address of `entry`, which never returns
    *--top = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    context = {};
    context.stack_pointer = top;
    context.stack_bottom = bottom;
    context.stack_bytes = kStackBytes;
  }

 private:
  char* stack(unsigned index) { return base_ + index * kSlotBytes + kGuardBytes; }

  char* base_ = nullptr;
};

}  // namespace emu
