// npu_swiglu_quant to int8. Formula and traps: npu_fusion/meta_impls/swiglu_quant.py.
//
// In dynamic mode the gated values stay in a buffer of the thread until their largest magnitude is known.
#include "quantize_row.h"
#include "rows.h"
#include "swiglu.h"

namespace npu {
namespace {

// The order of the fields is that of ../swiglu_quant.py.
struct Call {
    const void* x;  // [T, 2H]
    int64_t x_type;
    const float* smooth;   // [G, H] or null
    const float* offset;   // [G, H] or null
    const int32_t* group;  // [G], ends or sizes of the groups, or null
    int8_t* y;             // [T, H]
    float* scale;          // [T]
    int64_t rows, width, groups, group_ends, activate_left, dynamic, threads;
};

constexpr float LARGEST = 127.0f;

template <class In>
Status run(const Call& c) {
    using O = Order<In>;
    const int64_t h = c.width, bytes = 2 * h * int64_t{sizeof(In)};
    expect_writes(c.y, c.rows * h);
    return over_rows(c.rows, bytes, c.threads, h, [&](int64_t begin, int64_t end, float* buffer) {
        Groups groups(c.group, c.groups, c.group_ends);
        for (int64_t row = begin; row < end; ++row) {
            const int64_t group = c.group ? groups.of(row) : 0;
            const float* smooth = c.smooth && group >= 0 ? c.smooth + group * h : nullptr;
            const float* offset = c.offset && group >= 0 ? c.offset + group * h : nullptr;
            const GatedRow<In> r(c.x, row, h, c.activate_left);
            auto smoothed = [&](int64_t j, auto... n) NPU_LAMBDA {
                Block v = r.value(j, n...);
                return smooth ? v * load_block<O>(smooth + j, n...) : v;
            };
            int8_t* y = c.y + row * h;
            if (!c.dynamic) {
                c.scale[row] = 0;
                store_row<O>(y, h, [&](int64_t j, auto... n) NPU_LAMBDA {
                    Block v = smoothed(j, n...);
                    return offset ? v + load_block<O>(offset + j, n...) : v;
                });
                continue;
            }
            vi most{};
            for_blocks(h, [&](int64_t j, auto... n) NPU_LAMBDA {
                Block v = smoothed(j, n...);
                store_raw(buffer + j, v);
                most = max(most, magnitude(v));
            });
            const float scale = LARGEST / bits<float>(largest(most));
            c.scale[row] = scale;
            auto scaled = [&](int64_t j, auto...) NPU_LAMBDA {
                return load_raw(buffer + j) * scale;
            };
            // Else the row is all zero, or so small that the scale overflows, or has an infinity or a NaN.
            if (scale > 0.0f && scale < __builtin_inff())
                store_small_row<O>(y, h, scaled);
            else
                store_row<O>(y, h, scaled);
        }
    });
}

}  // namespace
}  // namespace npu

NPU_KERNEL(swiglu_quant)(const npu::Call* c) {
    return npu::with_float_type(c->x_type, [&](auto in) { return npu::run<decltype(in)>(*c); });
}
