// npu_dynamic_quant and npu_dynamic_quant_asymmetric to int8. Formulas and traps:
// npu_fusion/meta_impls/dynamic_quant.py.
//
// The first loop over a row finds its extremes, the second, which reads the row from the first-level cache,
// quantizes it and meanwhile fetches what follows.
#include "quantize_row.h"
#include "rows.h"

namespace npu {
namespace {

// The order of the fields is that of ../dynamic_quant.py.
struct Call {
    const void* x;  // [T, H]
    int64_t x_type;
    const void* smooth;    // [G, H] or null
    int64_t smooth_type;   // that of x, or float
    const int32_t* group;  // [G], the ends of the groups, or null
    int8_t* y;             // [T, H]
    float* scale;          // [T], or [1] for the whole tensor
    float* offset;         // [T], asymmetric only
    int64_t rows, width, groups, whole_tensor, threads;
};

// While a row is quantized, what follows it at this distance (or a row's, if that is more) is fetched.
constexpr int64_t FETCHED_BYTES = 16 << 10;

constexpr float LARGEST = 127.0f, SMALLEST_ASYMMETRIC_SCALE = 1e-12f;

// x, times the smoothing scales if there are any.
template <class In, class Smooth>
struct Row {
    const In* x;
    const Smooth* smooth;

    template <class... N>
    NPU_MEMBER Block value(int64_t j, N... n) const {
        Block v = load_block<Order<In>>(x + j, n...);
        return smooth ? v * load_block<Order<In>>(smooth + j, n...) : v;
    }
};

template <class In, class Smooth>
Row<In, Smooth> row_of(const Call& c, int64_t row, Groups<int32_t>& groups) {
    const Smooth* smooth = static_cast<const Smooth*>(c.smooth);
    if (c.group) {
        const int64_t group = groups.of(row);
        smooth = group < 0 ? nullptr : smooth + group * c.width;
    }
    return {static_cast<const In*>(c.x) + row * c.width, smooth};
}

NPU_INLINE float largest_magnitude(const float* x, int64_t n) {
    vi most{}, other{};
    int64_t j = 0;
    for (; j + BLOCK <= n; j += BLOCK) {
        most = max(most, magnitude(load(x + j)));
        other = max(other, magnitude(load(x + j + W)));
    }
    if (j < n) most = max(most, magnitude(load_block<Natural>(x + j, n - j)));
    return bits<float>(largest(max(most, other)));
}

// As integers the magnitudes of 16-bit floats are ordered, too: they are widened when the largest is known.
template <class In>
NPU_INLINE float largest_magnitude(const In* x, int64_t n) {
    static_assert(sizeof(In) == 2, "a 16-bit type");
    vi16 most{}, other{};
    int64_t j = 0;
    for (; j + 2 * BLOCK <= n; j += 2 * BLOCK) {
        most = max(most, load_bytes<vi16>(x + j, sizeof(vi16)) & 0x7fff);
        other = max(other, load_bytes<vi16>(x + j + BLOCK, sizeof(vi16)) & 0x7fff);
    }
    for (; j < n; j += BLOCK) {
        const int64_t bytes = n - j < BLOCK ? 2 * (n - j) : int64_t{sizeof(vi16)};
        most = max(most, load_bytes<vi16>(x + j, bytes) & 0x7fff);
    }
    In each[BLOCK];
    most = max(most, other);
    std::memcpy(each, &most, sizeof each);
    Block magnitudes = Natural::load(each);
    return bits<float>(largest(magnitude(magnitudes)));
}

template <class In, class Smooth>
NPU_INLINE float largest_of(const Row<In, Smooth>& row, int64_t width) {
    if (!row.smooth) return largest_magnitude(row.x, width);
    vi most{};
    for_blocks(width, [&](int64_t j, auto... n) NPU_LAMBDA {
        most = max(most, magnitude(row.value(j, n...)));
    });
    return bits<float>(largest(most));
}

template <class In, class Smooth>
NPU_INLINE void quantize(const Row<In, Smooth>& row, float scale, int8_t* y, int64_t width) {
    constexpr int64_t FETCHED = FETCHED_BYTES / sizeof(In);
    const In* later = row.x + (width > FETCHED ? width : FETCHED);
    quantize_row<Order<In>>(scale, y, width, [&](int64_t j, auto... n) NPU_LAMBDA {
        fetch_block(later + j);
        return row.value(j, n...);
    });
}

template <class In, class Smooth>
Status by_row(const Call& c) {
    return over_rows(c.rows, c.width * sizeof(In), c.threads, 0, [&](int64_t begin, int64_t end, float*) {
        Groups groups(c.group, c.groups, true);
        for (int64_t row = begin; row < end; ++row) {
            const Row<In, Smooth> r = row_of<In, Smooth>(c, row, groups);
            c.scale[row] = largest_of(r, c.width) / LARGEST;
            quantize(r, c.scale[row], c.y + row * c.width, c.width);
        }
    });
}

template <class In, class Smooth>
Status by_tensor(const Call& c) {
    int32_t most = 0;  // the bits of the largest magnitude
    over_rows(c.rows, c.width * sizeof(In), c.threads, 0, [&](int64_t begin, int64_t end, float*) {
        Groups groups(c.group, c.groups, true);
        int32_t here = 0;
        for (int64_t row = begin; row < end; ++row) {
            const Row<In, Smooth> r = row_of<In, Smooth>(c, row, groups);
            const int32_t m = bits<int32_t>(largest_of(r, c.width));
            here = m > here ? m : here;
        }
        int32_t seen = __atomic_load_n(&most, __ATOMIC_RELAXED);
        while (here > seen &&
               !__atomic_compare_exchange_n(&most, &seen, here, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    });
    const float scale = bits<float>(most) / LARGEST;
    c.scale[0] = scale;
    return over_rows(c.rows, c.width * sizeof(In), c.threads, 0, [&](int64_t begin, int64_t end, float*) {
        Groups groups(c.group, c.groups, true);
        for (int64_t row = begin; row < end; ++row) {
            const Row<In, Smooth> r = row_of<In, Smooth>(c, row, groups);
            quantize(r, scale, c.y + row * c.width, c.width);
        }
    });
}

template <class In, class Smooth>
Status asymmetric(const Call& c) {
    const int64_t bytes = c.width * sizeof(In);
    return over_rows(c.rows, bytes, c.threads, BLOCK, [&](int64_t begin, int64_t end, float* last) {
        Groups groups(c.group, c.groups, true);
        for (int64_t row = begin; row < end; ++row) {
            const Row<In, Smooth> r = row_of<In, Smooth>(c, row, groups);
            vf low = set(__builtin_inff()), high = -low;
            vi unknown{};  // where a NaN has been: minimum and maximum lose it
            auto see = [&](vf x) NPU_LAMBDA {
                unknown |= x != x;
                low = min(x, low);
                high = max(x, high);
            };
            for_blocks(c.width, [&](int64_t j, auto... n) NPU_LAMBDA {
                Block v = r.value(j, n...);
                if constexpr (sizeof...(n) > 0) {
                    // What pads the last block must not take part: one of its elements does, in their place.
                    store_block<Order<In>>(last, v);
                    for (int64_t i = (n, ...); i < BLOCK; ++i) last[i] = last[0];
                    v = load_raw(last);
                }
                see(v.a);
                see(v.b);
            });
            float least = low[0], most = high[0];
            bool nan = unknown[0];
            for (int i = 1; i < W; ++i) {
                least = low[i] < least ? low[i] : least;
                most = high[i] > most ? high[i] : most;
                nan |= unknown[i] != 0;
            }
            if (nan) least = most = __builtin_nanf("");
            float scale = (most - least) / (2 * LARGEST + 1);
            if (scale < SMALLEST_ASYMMETRIC_SCALE) scale = SMALLEST_ASYMMETRIC_SCALE;
            const float offset = LARGEST - most / scale;
            c.scale[row] = scale;
            c.offset[row] = offset;
            int8_t* y = c.y + row * c.width;
            for_blocks(c.width, [&](int64_t j, auto... n) NPU_LAMBDA {
                store_int8<Order<In>>(y + j, r.value(j, n...) / scale + offset, n...);
            });
        }
    });
}

// fn(element of x, element of smooth)
template <class Fn>
Status with_types(const Call& c, const Fn& fn) {
    expect_writes(c.y, c.rows * c.width);
    return with_float_type(c.x_type, [&](auto in) {
        return c.smooth && c.smooth_type == FLOAT ? fn(in, float{}) : fn(in, in);
    });
}

}  // namespace
}  // namespace npu

NPU_KERNEL(dynamic_quant)(const npu::Call* c) {
    return npu::with_types(*c, [&](auto in, auto smooth) {
        using In = decltype(in);
        using Smooth = decltype(smooth);
        return c->whole_tensor ? npu::by_tensor<In, Smooth>(*c) : npu::by_row<In, Smooth>(*c);
    });
}

NPU_KERNEL(dynamic_quant_asymmetric)(const npu::Call* c) {
    return npu::with_types(*c, [&](auto in, auto smooth) {
        return npu::asymmetric<decltype(in), decltype(smooth)>(*c);
    });
}
