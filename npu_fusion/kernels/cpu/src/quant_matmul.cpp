// npu_quant_matmul: an int8 product whose sums are dequantized while they are in the cache.
// Formula and traps: npu_fusion/meta_impls/quant_matmul.py.
#include "dequantize.h"
#include "int8_gemm.h"
#include "isa.h"

namespace npu {
namespace {

struct Call {
    const int8_t* x;  // [m, k], in rows of x_step bytes
    int64_t x_step;
    const int8_t* w;  // [n, k] (w_has_rows_of_k) or [k, n], in rows of w_step bytes
    int64_t w_step, w_has_rows_of_k;
    int64_t m, n, k;
    const float* scale;  // [n], or [1] where scale_step is 0; not read for int32
    int64_t scale_step;
    const float* pertoken_scale;  // [m] or null
    const int32_t* int_bias;      // [n] or null
    const float* float_bias;      // [n] or null
    const float* offset;          // like scale, or null
    int64_t offset_step;
    void* y;  // [m, n], contiguous
    int64_t y_type, threads;
};

Int8Product product(const Call& c) {
    return {{c.x, c.x_step}, {c.w, c.w_step}, c.w_has_rows_of_k != 0, c.m, c.n, c.k};
}

template <class Out>
int64_t dequantized(const Call& c) {
    Dequantization d{c.scale,  c.pertoken_scale, c.int_bias,   c.float_bias,
                     c.offset, c.scale_step,     c.offset_step};
    Out* y = static_cast<Out*>(c.y);
    return int8_gemm(product(c), c.threads, [&](const Sums& sums) { dequantize(d, sums, y, c.n); });
}

int64_t raw(const Call& c) {
    int32_t* y = static_cast<int32_t*>(c.y);
    return int8_gemm(product(c), c.threads, [&](const Sums& s) {
        for (int64_t r = 0; r < s.rows; ++r) {
            const int32_t* from = s.data + r * s.step;
            int32_t* to = y + (s.row + r) * c.n + s.column;
            if (!c.int_bias) {
                std::memcpy(to, from, s.columns * sizeof(int32_t));
                continue;
            }
            for (int64_t i = 0; i < s.columns; i += W) {
                int64_t n = least(W, s.columns - i);
                store(to + i, (vi)((vu)load(from + i) + (vu)load(c.int_bias + s.column + i, n)), n);
            }
        }
    });
}

}  // namespace
}  // namespace npu

NPU_KERNEL(quant_matmul)(const npu::Call* c) {
    using namespace npu;
    switch (c->y_type) {
        case INT32: return raw(*c);
        case INT8: return dequantized<int8_t>(*c);
        case HALF: return dequantized<half>(*c);
        case BFLOAT16: return dequantized<bf16>(*c);
        case FLOAT: return dequantized<float>(*c);
        default: return REFUSED;
    }
}
