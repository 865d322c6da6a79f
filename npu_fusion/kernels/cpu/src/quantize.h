// Rows of floats to int8: the division by a scale and the roundings that the quantizing kernels share.
#pragma once

#include <type_traits>

#include "simd.h"

namespace npu {
namespace {

// The values of the operators' round_mode.
enum Rounding : int64_t { RINT = 0, HALF_AWAY = 1, FLOOR = 2, CEIL = 3, TRUNC = 4 };

// x as a whole number, |x| < 2^22; beyond that x as it is: every float there is whole, or saturates anyway.
template <Rounding rounding>
NPU_INLINE vf whole(vf x) {
    vf size = bits<vf>(magnitude(x));
    vi small = size < 4194304.0f;
    vf nearest = rint(x);
    vf y;
    if constexpr (rounding == RINT) {
        return x;  // to_int8 rounds so
    } else if constexpr (rounding == FLOOR) {
        y = nearest - select(nearest > x, set(1.0f), vf{});
    } else if constexpr (rounding == CEIL) {
        y = nearest + select(nearest < x, set(1.0f), vf{});
    } else {
        vf down = rint(size);
        down = down - select(down > size, set(1.0f), vf{});
        if constexpr (rounding == HALF_AWAY) down = down + select(size - down >= 0.5f, set(1.0f), vf{});
        y = select(x < 0.0f, -down, down);
    }
    return select(small, y, x);
}

// x / scale for a row, as the division instruction rounds it, at the cost of multiplications: with the rounded
// reciprocal r, q = x * r is off by little more than a unit, and q + (x - q * scale) * r is the rounded
// quotient (Markstein). Scales whose reciprocal or products could leave the normal range are divided by.
class Divider {
  public:
    explicit Divider(float scale)
        : scale_(scale), reciprocal_(1.0f / scale), exact_(!(scale > 1e-25f && scale < 1e25f)) {}

    bool by_division() const { return exact_; }

    // For a scale that is not by_division(); |x| at most some thousands of scales.
    NPU_INLINE vf times(vf x, const Divider& d) {
        vf q = x * d.reciprocal_;
        vf rest = fma(-q, set(d.scale_), x);
        return fma(rest, set(d.reciprocal_), q);
    }

  private:
    float scale_, reciprocal_;
    bool exact_;
};

// The scale of a row from the largest magnitude (see simd.h) of its elements.
NPU_INLINE float symmetric_scale(vi amax) { return bits<float>(largest(amax)) / 127.0f; }

// fn(std::integral_constant<Rounding, ..>) for the rounding that an operator's round_mode names.
template <class Fn>
void with_rounding(int64_t round_mode, const Fn& fn) {
    switch (round_mode) {
        case HALF_AWAY: return fn(std::integral_constant<Rounding, HALF_AWAY>{});
        case FLOOR: return fn(std::integral_constant<Rounding, FLOOR>{});
        case CEIL: return fn(std::integral_constant<Rounding, CEIL>{});
        case TRUNC: return fn(std::integral_constant<Rounding, TRUNC>{});
        default: return fn(std::integral_constant<Rounding, RINT>{});
    }
}

}  // namespace
}  // namespace npu
