// npu_rotary_mul without a matrix. Formula and traps: npu_fusion/meta_impls/rotary_mul.py.
#include "rope.h"

namespace npu {
namespace {

// The order of the fields is that of ../_rope.py and ../rotary_mul.py.
struct Call {
    Rope rope;
    int64_t interleaved;
};

template <class In>
Status halves(const Rope& c) {
    using O = Order<In>;
    const int64_t h = c.sizes[3] / 2;
    return rotate_rows<In>(c, [h](const In* x, const In* cos, const In* sin, In* y) NPU_LAMBDA {
        for_blocks(h, [&](int64_t j, auto... n) NPU_LAMBDA {
            Block a = load_block<O>(x + j, n...), b = load_block<O>(x + h + j, n...);
            Block first = a * load_block<O>(cos + j, n...) + -b * load_block<O>(sin + j, n...);
            Block second = b * load_block<O>(cos + h + j, n...) + a * load_block<O>(sin + h + j, n...);
            store_block<O>(y + j, first, n...);
            store_block<O>(y + h + j, second, n...);
        });
    });
}

template <class In>
Status pairs(const Rope& c) {
    const int64_t width = c.sizes[3];
    return rotate_rows<In>(
        c, [width](const In* x, const In* cos, const In* sin, In* y) NPU_LAMBDA {
            for_blocks(width, [&](int64_t j, auto... n) NPU_LAMBDA {
                Block v = load_block<EvenOdd>(x + j, n...), s = load_block<EvenOdd>(sin + j, n...);
                Block turned{-v.b * s.a, v.a * s.b};
                store_block<EvenOdd>(y + j, v * load_block<EvenOdd>(cos + j, n...) + turned, n...);
            });
        });
}

}  // namespace
}  // namespace npu

NPU_KERNEL(rotary_mul)(const npu::Call* c) {
    return npu::with_float_type(c->rope.type, [&](auto in) {
        using In = decltype(in);
        return c->interleaved ? npu::pairs<In>(c->rope) : npu::halves<In>(c->rope);
    });
}
