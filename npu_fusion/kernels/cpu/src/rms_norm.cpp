// npu_rms_norm, npu_add_rms_norm and npu_add_rms_norm_cast. Formulas and traps:
// npu_fusion/meta_impls/rms_norm.py and add_rms_norm.py.
#include "norm.h"

namespace npu {
namespace {

// The order of the fields is that of ../_norm.py.
struct Call {
    int64_t x_type, gamma_type;
    Norm norm;
    void* y;        // [T, H], in the type of x
    float* y_fp32;  // [T, H] or null: y, rounded, in fp32
};

template <class In, class Gamma, bool added>
Status run(const Call& c) {
    using Row = NormRow<In, Gamma, added>;
    using O = typename Row::O;
    const int64_t h = c.norm.width, count = c.norm.rows * h;
    expect_writes(c.y, count * sizeof(In));
    if (c.y_fp32) expect_writes(c.y_fp32, count * sizeof(float));
    return norm_rows<In, Gamma, added>(c.norm, false, [&](int64_t row, const Row& r, float*, float*) {
        In* y = static_cast<In*>(c.y) + row * h;
        for_blocks(h, [&](int64_t j, auto... n) NPU_LAMBDA {
            store_block<O>(y + j, r.value(j, n...), n...);
        });
        if (c.y_fp32) {
            float* wide = c.y_fp32 + row * h;
            for_blocks(h, [&](int64_t j, auto... n) NPU_LAMBDA {
                store_block<O>(wide + j, load_block<O>(y + j, n...), n...);
            });
        }
    });
}

}  // namespace
}  // namespace npu

NPU_KERNEL(rms_norm)(const npu::Call* c) {
    using namespace npu;
    return with_float_type(c->x_type, [&](auto in) {
        using In = decltype(in);
        if (c->norm.x2) return run<In, In, true>(*c);
        if (c->gamma_type == c->x_type) return run<In, In, false>(*c);
        return run<In, float, false>(*c);
    });
}
