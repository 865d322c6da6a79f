// The gated halves of a row of floating-point numbers: silu(act) * lin.
#pragma once

#include "block.h"
#include "math.h"

namespace npu {
namespace {

template <class In>
class GatedRow {
  public:
    // Row `row` of x [T, 2 * width].
    GatedRow(const void* x, int64_t row, int64_t width, bool activate_left)
        : act_(static_cast<const In*>(x) + (2 * row + !activate_left) * width),
          lin_(static_cast<const In*>(x) + (2 * row + activate_left) * width),
          next_(2 * width) {}

    // The gated values at j; fetches what the next row has there.
    template <class... N>
    NPU_MEMBER Block value(int64_t j, N... n) const {
        fetch_block(act_ + next_ + j);
        fetch_block(lin_ + next_ + j);
        Block act = load_block<Order<In>>(act_ + j, n...);
        return Block{silu(act.a), silu(act.b)} * load_block<Order<In>>(lin_ + j, n...);
    }

  private:
    const In *act_, *lin_;
    int64_t next_;
};

}  // namespace
}  // namespace npu
