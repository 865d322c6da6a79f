// Outputs that the allocator takes fresh from the operating system.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace npu {
namespace {

// glibc maps blocks of this size anew at every allocation, whatever came before.
constexpr int64_t ALWAYS_MAPPED = int64_t{32} << 20;

// To be called before an output of `bytes` is written for the first time. Touching each of its 4 KB pages costs
// more than the writing (three times a memcpy of it, measured); pages of 2 MB cost little. It is advice: where
// the system has no such pages it does nothing.
static inline void expect_writes(void* p, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    if (bytes < ALWAYS_MAPPED) return;
    constexpr uintptr_t PAGE = uintptr_t{2} << 20;
    uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + PAGE - 1) & ~(PAGE - 1);
    uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) & ~(PAGE - 1);
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace npu
