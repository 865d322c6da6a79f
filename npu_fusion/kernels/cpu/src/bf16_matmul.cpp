// Products of bf16 matrices, summed in fp32 and rounded once: ours where they are faster than oneDNN's, see
// ../_bf16_matmul.py.
#include <cstdlib>

#include "bf16_dots.h"
#include "bf16_strips.h"
#include "isa.h"
#include "parallel.h"

namespace npu {
namespace {

// Strips whose sums are computed together have at most so many floats: they stay in the second-level cache.
constexpr int64_t MOST_SUMS = 1 << 16;
constexpr int64_t WORK_OF_A_THREAD = 1 << 17;

template <class Dot>
Status by_dots(const Bf16Product& p) {
    const int64_t each = (p.n + DOT_COLUMNS - 1) / DOT_COLUMNS;
    const int64_t grain = WORK_OF_A_THREAD / (DOT_COLUMNS * p.k + 1) + 1;
    parallel_for(p.batches * each, p.threads, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) dot_columns<Dot>(p, i / each, i % each * DOT_COLUMNS);
    });
    return DONE;
}

template <class Dot>
Status by_strips(const Bf16Product& p) {
    const int64_t each = (p.n + STRIP - 1) / STRIP;
    const int64_t together = MOST_SUMS / (p.m * STRIP) + 1;
    const int64_t grain = WORK_OF_A_THREAD / (STRIP * p.k + 1) + 1;
    int failed = 0;
    parallel_for(p.batches * each, p.threads, grain, [&](int64_t begin, int64_t end) {
        const int64_t sums = sizeof(float) * p.m * STRIP * least(together, each);
        char* memory = static_cast<char*>(std::aligned_alloc(64, (sums + 2 * KEPT * STRIP + 63) / 64 * 64));
        if (!memory) {
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            return;
        }
        for (int64_t i = begin, next; i < end; i = next) {
            const int64_t batch = i / each, first = i % each;
            next = least(end, least(i + together, (batch + 1) * each));
            strips<Dot>(p, batch, first, first + next - i, reinterpret_cast<float*>(memory),
                        reinterpret_cast<vi*>(memory + sums));
        }
        std::free(memory);
    });
    return failed ? NO_MEMORY : DONE;
}

template <class Dot>
Status multiply(const Bf16Product& p) {
    return p.w_has_rows_of_k ? by_dots<Dot>(p) : by_strips<Dot>(p);
}

}  // namespace
}  // namespace npu

// The order of the fields is that of ../_bf16_matmul.py.
NPU_KERNEL(bf16_matmul)(const npu::Bf16Product* p) {
    using namespace npu;
    return NativePairs::available() ? multiply<NativePairs>(*p) : multiply<WidenedPairs>(*p);
}
