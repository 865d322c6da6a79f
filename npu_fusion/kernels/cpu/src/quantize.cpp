// npu_quantize to int8, with scales for the last dimension or one scale. Formula and traps:
// npu_fusion/meta_impls/quantize.py.
#include "quantize_row.h"
#include "rows.h"

namespace npu {
namespace {

// The order of the fields is that of ../quantize.py.
struct Call {
    const void* x;  // [T, H]
    int64_t x_type;
    const float* scale;       // [H], or one number where step is 0
    const float* zero_point;  // like scale, or null
    int8_t* y;                // [T, H]
    int64_t rows, width, step, divide, threads;
};

template <class In, bool divide, bool step>
Status run(const Call& c) {
    using O = Order<In>;
    auto parameter = [](const float* p, int64_t j, auto... n) NPU_LAMBDA {
        return step ? load_block<O>(p + j, n...) : Block{} + *p;
    };
    expect_writes(c.y, c.rows * c.width);
    return over_rows(c.rows, c.width * sizeof(In), c.threads, 0, [&](int64_t begin, int64_t end, float*) {
        for (int64_t row = begin; row < end; ++row) {
            const In* x = static_cast<const In*>(c.x) + row * c.width;
            store_row<O>(c.y + row * c.width, c.width, [&](int64_t j, auto... n) NPU_LAMBDA {
                Block v = load_block<O>(x + j, n...), scale = parameter(c.scale, j, n...);
                v = divide ? v / scale : v * scale;
                return c.zero_point ? v + parameter(c.zero_point, j, n...) : v;
            });
        }
    });
}

}  // namespace
}  // namespace npu

NPU_KERNEL(quantize)(const npu::Call* c) {
    return npu::with_float_type(c->x_type, [&](auto in) {
        using In = decltype(in);
        if (c->divide) return c->step ? npu::run<In, true, true>(*c) : npu::run<In, true, false>(*c);
        return c->step ? npu::run<In, false, true>(*c) : npu::run<In, false, false>(*c);
    });
}
