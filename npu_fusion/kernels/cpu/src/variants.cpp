// Which of the compiled variants this processor can run, best first. Compiled once.
#include "isa.h"

extern "C" {

// The sources that this library was made of (see ../_build.py).
NPU_EXPORT const char* npu_digest() { return NPU_DIGEST; }

// Whether the processor, and the operating system with it, has what `variant` was compiled for.
NPU_EXPORT int64_t npu_runs(const char* variant);
}

#if defined(__x86_64__)

#include <cstring>

int64_t npu_runs(const char* variant) {
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (std::strcmp(variant, "avx2") == 0) return avx2;
    if (std::strcmp(variant, "avx512") == 0)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
    return 0;
}

#elif defined(__aarch64__)

#include <cstring>
#include <sys/auxv.h>

int64_t npu_runs(const char* variant) {
    constexpr unsigned long ASIMDDP = 1UL << 20;  // HWCAP_ASIMDDP of <asm/hwcap.h>
    if (std::strcmp(variant, "neon") == 0) return (getauxval(AT_HWCAP) & ASIMDDP) != 0;
    return 0;
}

#else

int64_t npu_runs(const char*) { return 0; }

#endif
