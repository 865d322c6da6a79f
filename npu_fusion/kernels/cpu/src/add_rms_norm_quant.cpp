// npu_add_rms_norm_quant. Formula and traps: npu_fusion/meta_impls/add_rms_norm_quant.py.
#include "norm.h"

namespace npu {
namespace {

struct Output {
    const float* scale;       // [H], null for an output that is zero
    const float* zero_point;  // [H] or null
    int8_t* y;                // [T, H]
};

// The order of the fields is that of ../_norm.py and ../add_rms_norm_quant.py.
struct Call {
    int64_t x_type, gamma_type;
    Norm norm;
    Output outputs[2];
    int64_t divide;
};

template <class In, bool divide>
Status run(const Call& c) {
    using Row = NormRow<In, In, true>;
    using O = typename Row::O;
    const int64_t h = c.norm.width;
    for (const Output& output : c.outputs) expect_writes(output.y, c.norm.rows * h);
    return norm_rows<In, In, true>(c.norm, false, [&](int64_t row, const Row& r, float*, float*) {
        for (const Output& output : c.outputs) {
            int8_t* y = output.y + row * h;
            if (!output.scale) {
                std::memset(y, 0, h);
                continue;
            }
            for_blocks(h, [&](int64_t j, auto... n) NPU_LAMBDA {
                Block v = r.value(j, n...), scale = load_block<O>(output.scale + j, n...);
                v = divide ? v / scale : v * scale;
                if (output.zero_point) v = v + load_block<O>(output.zero_point + j, n...);
                store_int8<O>(y + j, v, n...);
            });
        }
    });
}

}  // namespace
}  // namespace npu

NPU_KERNEL(add_rms_norm_quant)(const npu::Call* c) {
    return npu::with_float_type(c->x_type, [&](auto in) {
        using In = decltype(in);
        return c->divide ? npu::run<In, true>(*c) : npu::run<In, false>(*c);
    });
}
