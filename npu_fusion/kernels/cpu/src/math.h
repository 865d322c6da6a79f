// exp and what is made of it, in fp32, each within 2 units in the last place of the exact value.
#pragma once

#include "simd.h"

namespace npu {
namespace {

// exp(x) = 2^n * exp(r), n = rint(x / ln 2), |r| <= ln(2) / 2; exp(r) by its Taylor polynomial of degree 7, whose
// remainder is below 2^-27 there. ln 2 is taken in two parts, the first of few bits: n * LN2_HIGH is exact.
// Overflows to infinity, underflows through the denormals to 0, keeps NaN.
NPU_INLINE vf exp(vf x) {
    constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    // Beyond these exp is infinite or 0 anyway; max and min pass a NaN in their second argument on.
    x = min(set(89.0f), max(set(-105.0f), x));
    vf n = rint(x * LOG2E);
    vf r = fma(n, set(-LN2_LOW), fma(n, set(-LN2_HIGH), x));
    // Two chains side by side, because the loops wait for their length rather than for their number.
    vf r2 = r * r;
    vf high = fma(fma(set(1.0f / 5040), r, set(1.0f / 720)), r2, fma(set(1.0f / 120), r, set(1.0f / 24)));
    vf low = fma(set(1.0f / 6), r, set(0.5f));
    vf p = fma(fma(high, r2, low), r2, r) + 1.0f;
    return scale_by_power(p, n);
}

// x / (1 + exp(-alpha * x)); alpha 1 is silu.
NPU_INLINE vf gate(vf x, float alpha) { return x / (1.0f + exp(-(alpha * x))); }
NPU_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }

}  // namespace
}  // namespace npu
