// npu_dequant_swiglu_quant. Formula and traps: npu_fusion/meta_impls/dequant_swiglu_quant.py.
//
// A row of x is read once. Its gated values stay in a buffer of the thread, in the first-level cache, while their
// largest magnitude is found; a second loop over that buffer quantizes them.
#include "math.h"
#include "quantize_row.h"
#include "rows.h"

namespace npu {
namespace {

enum SwiGlu : int64_t { HALVES = 0, INTERLEAVED_CLIPPED = 1, HALVES_CLIPPED = 2 };

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
    NPU_MEMBER vf value(int64_t at, N... n) const {
        vi acc = load(x + at, n...);
        if (int_bias) acc = (vi)((vu)acc + (vu)load(int_bias + at, n...));
        vf d = to_float(acc) * load(weight_scale + at, n...);
        if (scaled_by_token) d = d * token_scale;
        if (float_bias) d = d + load(float_bias + at, n...);
        return d;
    }
};

template <class In>
struct Row {
    const In* x;

    Row(const Call& c, int64_t row, int64_t) : x(static_cast<const In*>(c.x) + row * 2 * c.width) {}

    template <class... N>
    NPU_MEMBER vf value(int64_t at, N... n) const {
        return load(x + at, n...);
    }
};

// The W (or n) pairs of neighbours from the j-th on.
template <class In>
NPU_INLINE Block pairs(const Row<In>& row, int64_t j) {
    return {row.value(2 * j), row.value(2 * j + W)};
}
template <class In>
NPU_INLINE Block pairs(const Row<In>& row, int64_t j, int64_t n) {
    if (2 * n <= W) return {row.value(2 * j, 2 * n), vf{}};
    return {row.value(2 * j), row.value(2 * j + W, 2 * n - W)};
}

NPU_INLINE vf clipped_gate(const Call& c, vf act, vf lin) {
    // The comparisons keep a NaN, as clamp does.
    const float limit = c.limit, alpha = c.alpha, bias = c.bias;
    act = select(act > limit, set(limit), act);
    lin = select(lin > limit, set(limit), select(lin < -limit, set(-limit), lin));
    return gate(act, alpha) * (lin + bias);
}

// out[0..H) = the gated row, times the smoothing scale in dynamic mode; returns the largest magnitude.
template <class In, SwiGlu swiglu>
vi gated(const Call& c, const Row<In>& row, const float* smooth, float* out) {
    const int64_t h = c.width;
    const int64_t act_at = c.activate_left ? 0 : h, lin_at = h - act_at;
    auto step = [&](int64_t j, auto... n) NPU_LAMBDA {
        vf s;
        if constexpr (swiglu == INTERLEAVED_CLIPPED) {
            Block both = deinterleaved(pairs(row, j, n...));
            s = clipped_gate(c, both.a, both.b);
        } else {
            vf act = row.value(act_at + j, n...), lin = row.value(lin_at + j, n...);
            s = swiglu == HALVES ? silu(act) * lin : clipped_gate(c, act, lin);
        }
        if (smooth) s = s * npu::load(smooth + j, n...);
        store(out + j, s, n...);
        return magnitude(s);
    };
    vi amax{};
    int64_t j = 0;
    const auto* next = row.x + 2 * h;
    vi other{};
    for (; j + 2 * W <= h; j += 2 * W) {
        __builtin_prefetch(next + j, 0, 2);
        __builtin_prefetch(next + h + j, 0, 2);
        __builtin_prefetch(next + j + W, 0, 2);
        __builtin_prefetch(next + h + j + W, 0, 2);
        amax = max(amax, step(j));
        other = max(other, step(j + W));
    }
    amax = max(amax, other);
    for (; j + W <= h; j += W) amax = max(amax, step(j));
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
    store_row<Natural>(y, h, [&](int64_t j, auto... n) NPU_LAMBDA {
        Block q = load_raw(s + j);
        if (scale) q = step ? q / load_block<Natural>(scale + j, n...) : q / *scale;
        if (offset) q = step ? q + load_block<Natural>(offset + j, n...) : q + *offset;
        return Block{whole<rounding>(q.a), whole<rounding>(q.b)};
    });
}

// y = round(s / scale)
template <Rounding rounding>
void quantize_dynamic(float scale, const float* s, int8_t* y, int64_t h) {
    if (rounding == RINT) {
        quantize_row<Natural>(scale, y, h, [&](int64_t j, auto...) NPU_LAMBDA { return load_raw(s + j); });
    } else if (scale == 0.0f) {
        std::memset(y, 0, h);
    } else {
        store_row<Natural>(y, h, [&](int64_t j, auto...) NPU_LAMBDA {
            Block q = load_raw(s + j) / scale;
            return Block{whole<rounding>(q.a), whole<rounding>(q.b)};
        });
    }
}

template <class In, SwiGlu swiglu>
Status run(const Call& c) {
    const int64_t h = c.width;
    int64_t used = c.group_index ? 0 : c.rows;
    for (int64_t g = 0; c.group_index && g < c.groups; ++g) used += c.group_index[g] > 0 ? c.group_index[g] : 0;
    if (used > c.rows) return REFUSED;

    expect_writes(c.y, c.rows * h);
    return over_rows(c.rows, 2 * h * int64_t{sizeof(In)}, c.threads, h, [&](int64_t begin, int64_t end, float* s) {
        Groups groups(c.group_index, c.groups, false);
        for (int64_t row = begin; row < end; ++row) {
            int8_t* y = c.y + row * h;
            const int64_t group = c.group_index ? groups.of(row) : 0;
            if (group < 0) {
                std::memset(y, 0, h);
                c.scale[row] = 0;
                continue;
            }
            const float* smooth = c.dynamic && c.quant_scale ? c.quant_scale + group * h : nullptr;
            vi amax = gated<In, swiglu>(c, Row<In>(c, row, group), smooth, s);
            const float scale = c.scale[row] = c.dynamic ? symmetric_scale(amax) : 0;
            with_rounding(c.round_mode, [&](auto rounding) {
                if (c.dynamic)
                    quantize_dynamic<rounding>(scale, s, y, h);
                else
                    quantize_static<rounding>(c, group, s, y);
            });
        }
    });
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
