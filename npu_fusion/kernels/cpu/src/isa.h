// Each kernel source is compiled once per instruction set (see ../_build.py, which defines NPU_VARIANT and the
// compiler's flags). NPU_KERNEL(rms_norm) is then the exported function npu_rms_norm_avx512, _avx2, _neon ...,
// and everything else in these sources is local to its object file: two variants of one inline function must
// never be merged by the linker, or an AVX-512 body could run on a processor without it.
#pragma once

#include <cstdint>

#define NPU_JOIN_(a, b, c) a##b##_##c
#define NPU_JOIN(a, b, c) NPU_JOIN_(a, b, c)
#define NPU_EXPORT extern "C" __attribute__((visibility("default")))
#define NPU_KERNEL(name) NPU_EXPORT int64_t NPU_JOIN(npu_, name, NPU_VARIANT)

namespace npu {

// What an exported function returns.
enum Status : int64_t {
    DONE = 0,
    NO_MEMORY = 1,
    // The arguments were valid for the checks that do not read data; the reference kernel says what is wrong.
    REFUSED = 2,
};

// How the Python side names element types. The values are those of c10::ScalarType.
enum Type : int64_t { INT8 = 1, INT32 = 3, HALF = 5, FLOAT = 6, BFLOAT16 = 15 };

}  // namespace npu
