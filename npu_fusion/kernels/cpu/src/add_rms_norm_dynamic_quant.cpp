// npu_add_rms_norm_dynamic_quant to int8. Formula and traps:
// npu_fusion/meta_impls/add_rms_norm_dynamic_quant.py.
#include "norm.h"
#include "quantize_row.h"

namespace npu {
namespace {

struct Output {
    const void* smooth;  // [H] in the type of x, or null
    int8_t* y;           // [T, H], null for an output that does not exist
    float* scale;        // [T]
};

// The order of the fields is that of ../_norm.py and ../add_rms_norm_dynamic_quant.py.
struct Call {
    int64_t x_type, gamma_type;
    Norm norm;
    Output outputs[2];
};

template <class In>
Status run(const Call& c) {
    using Row = NormRow<In, In, true>;
    using O = typename Row::O;
    const int64_t h = c.norm.width;
    for (const Output& output : c.outputs)
        if (output.y) expect_writes(output.y, c.norm.rows * h);
    // The last output may be made where the sum is.
    const bool both = c.outputs[0].y && c.outputs[1].y;
    return norm_rows<In, In, true>(c.norm, both, [&](int64_t row, const Row& r, float* sum, float* scratch) {
        float* scaled = both ? scratch : sum;
        for (const Output& output : c.outputs) {
            if (!output.y) continue;
            const In* smooth = static_cast<const In*>(output.smooth);
            vi most{};
            for_blocks(h, [&](int64_t j, auto... n) NPU_LAMBDA {
                Block v = r.value(j, n...);
                if (smooth) v = v * load_block<O>(smooth + j, n...);
                store_raw(scaled + j, v);
                // Padding may have become 0 * infinity.
                most = max(most, magnitude(first<O>(v, n...)));
            });
            const float scale = symmetric_scale(most);
            output.scale[row] = scale;
            quantize_row<O>(scale, output.y + row * h, h, [&](int64_t j, auto...) NPU_LAMBDA {
                return load_raw(scaled + j);
            });
        }
    });
}

}  // namespace
}  // namespace npu

NPU_KERNEL(add_rms_norm_dynamic_quant)(const npu::Call* c) {
    return npu::with_float_type(c->x_type, [&](auto in) { return npu::run<decltype(in)>(*c); });
}
