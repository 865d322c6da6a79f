// npu_interleave_rope. Formula and traps: npu_fusion/meta_impls/interleave_rope.py.
#include "rope.h"

namespace npu {
namespace {

// The pairs (a, b) of a row to its halves:
//     y[j] = a * cos[j] - b * sin[j]        y[h + j] = b * cos[h + j] + a * sin[h + j]
template <class In>
Status run(const Rope& c) {
    const int64_t h = c.sizes[3] / 2;
    return rotate_rows<In>(c, [h](const In* x, const In* cos, const In* sin, In* y) NPU_LAMBDA {
        auto step = [&](int64_t j, auto... n) NPU_LAMBDA {
            Block v = load_block<EvenOdd>(x + 2 * j, 2 * n...);
            vf first = v.a * load(cos + j, n...) + -v.b * load(sin + j, n...);
            vf second = v.b * load(cos + h + j, n...) + v.a * load(sin + h + j, n...);
            store(y + j, first, n...);
            store(y + h + j, second, n...);
        };
        int64_t j = 0;
        for (; j + W <= h; j += W) step(j);
        if (j < h) step(j, h - j);
    });
}

}  // namespace
}  // namespace npu

NPU_KERNEL(interleave_rope)(const npu::Rope* c) {
    return npu::with_float_type(c->type, [&](auto in) { return npu::run<decltype(in)>(*c); });
}
