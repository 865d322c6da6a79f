// npu_swiglu along the last dimension. Formula and traps: npu_fusion/meta_impls/swiglu.py.
#include "swiglu.h"

#include "rows.h"

namespace npu {
namespace {

// The order of the fields is that of ../swiglu.py.
struct Call {
    const void* x;  // [T, 2H]
    int64_t x_type;
    void* y;  // [T, H]
    int64_t rows, width, threads;
};

template <class In>
Status run(const Call& c) {
    const int64_t h = c.width, bytes = 2 * h * int64_t{sizeof(In)};
    expect_writes(c.y, c.rows * h * sizeof(In));
    return over_rows(c.rows, bytes, c.threads, 0, [&](int64_t begin, int64_t end, float*) {
        for (int64_t row = begin; row < end; ++row) {
            const GatedRow<In> r(c.x, row, h, true);
            In* y = static_cast<In*>(c.y) + row * h;
            for_blocks(h, [&](int64_t j, auto... n) NPU_LAMBDA {
                store_block<Order<In>>(y + j, r.value(j, n...), n...);
            });
        }
    });
}

}  // namespace
}  // namespace npu

NPU_KERNEL(swiglu)(const npu::Call* c) {
    return npu::with_float_type(c->x_type, [&](auto in) { return npu::run<decltype(in)>(*c); });
}
