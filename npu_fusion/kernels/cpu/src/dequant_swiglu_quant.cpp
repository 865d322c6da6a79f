// npu_dequant_swiglu_quant. Formula and traps: npu_fusion/meta_impls/dequant_swiglu_quant.py.
//
// A row of x is read once. Its gated values stay in a buffer of the thread, in the first-level cache, while their
// largest magnitude is found; a second loop over that buffer quantizes them.
#include <cstdlib>

#include "isa.h"
#include "math.h"
#include "memory.h"
#include "parallel.h"
#include "quantize.h"
#include "simd.h"

namespace npu {
namespace {

enum SwiGlu : int64_t { HALVES = 0, INTERLEAVED_CLIPPED = 1, HALVES_CLIPPED = 2 };

// Rows are handed to threads in parts of at least this many bytes of x: below, waking a thread costs more.
constexpr int64_t GRAIN = 1 << 16;

// The order of the fields is that of ../dequant_swiglu_quant.py.
struct Call {
    const void* x;  // [T, 2H]
    int64_t x_type;
    const float* weight_scale;   // [G, 2H], null for floating-point x
    const float* token_scale;    // [T] or null
    const int32_t* int_bias;     // [G, 2H] or null
    const float* float_bias;     // [G, 2H] or null
    const float* quant_scale;    // [G, H] ([G, 1] where quant_step is 0) or null
    const float* quant_offset;   // like quant_scale
    const int64_t* group_index;  // [G] or null
    int8_t* y;                   // [T, H]
    float* scale;                // [T]
    int64_t rows, width, groups, quant_step, activate_left, dynamic, round_mode, swiglu, threads;
    double limit, alpha, bias;
};

// One row's x in fp32, dequantized.
template <class In>
struct Row;

template <>
struct Row<int32_t> {
    const int32_t* x;
    const float* weight_scale;
    const int32_t* int_bias;
    const float* float_bias;
    float token_scale;
    bool scaled_by_token;

    Row(const Call& c, int64_t row, int64_t group)
        : x(static_cast<const int32_t*>(c.x) + row * 2 * c.width),
          weight_scale(c.weight_scale + group * 2 * c.width),
          int_bias(c.int_bias ? c.int_bias + group * 2 * c.width : nullptr),
          float_bias(c.float_bias ? c.float_bias + group * 2 * c.width : nullptr),
          token_scale(c.token_scale ? c.token_scale[row] : 1.0f),
          scaled_by_token(c.token_scale != nullptr) {}

    template <class... N>
    NPU_INLINE vf value(const Row& r, int64_t at, N... n) {
        vi acc = npu::load(r.x + at, n...);
        if (r.int_bias) acc = (vi)((vu)acc + (vu)npu::load(r.int_bias + at, n...));
        vf d = to_float(acc) * npu::load(r.weight_scale + at, n...);
        if (r.scaled_by_token) d = d * r.token_scale;
        if (r.float_bias) d = d + npu::load(r.float_bias + at, n...);
        return d;
    }
};

template <class In>
struct Row {
    const In* x;

    Row(const Call& c, int64_t row, int64_t) : x(static_cast<const In*>(c.x) + row * 2 * c.width) {}

    template <class... N>
    NPU_INLINE vf value(const Row& r, int64_t at, N... n) {
        return npu::load(r.x + at, n...);
    }
};

NPU_INLINE vf clipped_gate(const Call& c, vf act, vf lin) {
    // The comparisons keep a NaN, as clamp does.
    const float limit = c.limit, alpha = c.alpha, bias = c.bias;
    act = select(act > limit, set(limit), act);
    lin = select(lin > limit, set(limit), select(lin < -limit, set(-limit), lin));
    return gate(act, alpha) * (lin + bias);
}

// out[0..H) = the gated row, times the smoothing scale in dynamic mode; returns the largest magnitude.
template <class In, SwiGlu swiglu>
vi gated(const Call& c, const Row<In>& row, const float* smooth, float* out, float* pairs) {
    const int64_t h = c.width;
    const int64_t act_at = c.activate_left ? 0 : h, lin_at = h - act_at;
    if constexpr (swiglu == INTERLEAVED_CLIPPED) {
        for (int64_t j = 0; j < 2 * h; j += W) {
            vf d = 2 * h - j >= W ? Row<In>::value(row, j) : Row<In>::value(row, j, 2 * h - j);
            float each[W];
            store(each, d);
            for (int64_t i = 0; i < W && j + i < 2 * h; ++i) pairs[(j + i) % 2 * h + (j + i) / 2] = each[i];
        }
    }
    auto step = [&](int64_t j, auto... n) __attribute__((always_inline)) {
        vf s;
        if constexpr (swiglu == INTERLEAVED_CLIPPED)
            s = clipped_gate(c, npu::load(pairs + j, n...), npu::load(pairs + h + j, n...));
        else {
            vf act = Row<In>::value(row, act_at + j, n...), lin = Row<In>::value(row, lin_at + j, n...);
            s = swiglu == HALVES ? silu(act) * lin : clipped_gate(c, act, lin);
        }
        if (smooth) s = s * npu::load(smooth + j, n...);
        store(out + j, s, n...);
        return magnitude(s);
    };
    vi amax{};
    int64_t j = 0;
    const auto* next = row.x + 2 * h;
    for (; j + W <= h; j += W) {
        __builtin_prefetch(next + j, 0, 2);
        __builtin_prefetch(next + h + j, 0, 2);
        amax = max(amax, step(j));
    }
    if (j < h) {
        // Elements beyond the row's end are made of zeros, but not zero where a bias is: they do not count.
        vi last = step(j, h - j);
        vi counted{};
        std::memcpy(&counted, &last, 4 * (h - j));
        amax = max(amax, counted);
    }
    return amax;
}

// y = round(s / quant_scale + quant_offset)
template <Rounding rounding>
void quantize_static(const Call& c, int64_t group, const float* s, int8_t* y) {
    const int64_t h = c.width, step = c.quant_step;
    const float* scale = c.quant_scale ? c.quant_scale + group * (step ? h : 1) : nullptr;
    const float* offset = c.quant_offset ? c.quant_offset + group * (step ? h : 1) : nullptr;
    for (int64_t j = 0; j < h; j += W) {
        int64_t n = h - j < W ? h - j : W;
        vf q = load(s + j, n);
        if (scale) q = q / (step ? load(scale + j, n) : set(*scale));
        if (offset) q = q + (step ? load(offset + j, n) : set(*offset));
        store(y + j, to_int8(whole<rounding>(q)), n);
    }
}

template <class In, SwiGlu swiglu>
Status run(const Call& c) {
    const int64_t h = c.width;
    const int64_t used = [&] {
        if (!c.group_index) return c.rows;
        int64_t sum = 0;
        for (int64_t g = 0; g < c.groups; ++g) sum += c.group_index[g] > 0 ? c.group_index[g] : 0;
        return sum;
    }();
    if (used > c.rows) return REFUSED;

    expect_writes(c.y, c.rows * h);
    int failed = 0;
    const int64_t grain = GRAIN / (2 * h * int64_t{sizeof(In)} + 1) + 1;
    parallel_for(c.rows, c.threads, grain, [&](int64_t begin, int64_t end) {
        const int64_t floats = swiglu == INTERLEAVED_CLIPPED ? 3 * h : h;
        float* buffer = static_cast<float*>(std::malloc(sizeof(float) * floats));
        if (!buffer) {
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            return;
        }
        int64_t group = c.group_index ? -1 : 0, group_end = c.group_index ? 0 : c.rows;
        for (int64_t row = begin; row < end; ++row) {
            int8_t* y = c.y + row * h;
            if (row >= used) {
                std::memset(y, 0, h);
                c.scale[row] = 0;
                continue;
            }
            while (row >= group_end) {
                ++group;
                group_end += c.group_index[group] > 0 ? c.group_index[group] : 0;
            }
            const float* smooth = c.dynamic && c.quant_scale ? c.quant_scale + group * h : nullptr;
            vi amax = gated<In, swiglu>(c, Row<In>(c, row, group), smooth, buffer, buffer + h);
            c.scale[row] = c.dynamic ? symmetric_scale(amax) : 0;
            with_rounding(c.round_mode, [&](auto rounding) {
                if (c.dynamic)
                    Divider(c.scale[row]).row<rounding>(buffer, y, h);
                else
                    quantize_static<rounding>(c, group, buffer, y);
            });
        }
        std::free(buffer);
    });
    return failed ? NO_MEMORY : DONE;
}

template <class In>
Status of_swiglu(const Call& c) {
    switch (c.swiglu) {
        case HALVES: return run<In, HALVES>(c);
        case INTERLEAVED_CLIPPED: return run<In, INTERLEAVED_CLIPPED>(c);
        default: return run<In, HALVES_CLIPPED>(c);
    }
}

}  // namespace
}  // namespace npu

NPU_KERNEL(dequant_swiglu_quant)(const npu::Call* c) {
    using namespace npu;
    switch (c->x_type) {
        case INT32: return of_swiglu<int32_t>(*c);
        case BFLOAT16: return of_swiglu<bf16>(*c);
        case HALF: return of_swiglu<half>(*c);
        default: return REFUSED;
    }
}
