// What npu_mla_prolog does between its products. Formula and traps: npu_fusion/meta_impls/mla_prolog.py.
//
//     cq ──▶ mla_norm ──▶ qn        q ──▶ mla_query ──▶ q_nope, query_rope        query ──▶ mla_quantize_query
//
// Each reads its product once, dequantizes it on the way, and writes what the next product takes. What becomes of
// the keys is in kv_rmsnorm_rope_cache.cpp.
#include "latent.h"
#include "quantize_row.h"
#include "rows.h"

namespace npu {
namespace {

// The order of the fields of each struct is that of ../mla_prolog.py.
struct QueryNorm {
    Product x;
    int64_t type;  // of gamma, and of y where it is not quantized
    const void* gamma;
    const float* smooth;  // [width] or null
    void* y;              // int8 with scale
    float* scale;         // [rows] or null
    int64_t threads;
    double epsilon, factor;
};

// y = rms_norm(x) * factor, rounded; or, with a scale, times `smooth` and quantized for each row.
template <class In, class F>
void norm(const QueryNorm& c, int64_t begin, int64_t end, float* n) {
    const int64_t width = c.x.width;
    auto value = [&](int64_t j, auto... count) __attribute__((always_inline)) {
        Block v = load_block<Natural>(n + j, count...);
        return c.smooth ? v * load_block<Natural>(c.smooth + j, count...) : v;
    };
    for (int64_t row = begin; row < end; ++row) {
        values<In>(c.x, row, 0, width, n);
        normalize(n, static_cast<const F*>(c.gamma), c.epsilon, c.factor, width);
        if (!c.scale) {
            convert(n, static_cast<F*>(c.y) + row * width, width);
            continue;
        }
        vi amax{};
        for_blocks(width, [&](int64_t j, auto... count) __attribute__((always_inline)) {
            amax = max(amax, magnitude(value(j, count...)));
        });
        c.scale[row] = symmetric_scale(amax);
        quantize_row<Natural>(c.scale[row], static_cast<int8_t*>(c.y) + row * width, width, value);
    }
}

struct Query {
    Product q;              // [rows, heads * (d + dr)]
    int64_t type;           // of everything else
    const void *cos, *sin;  // [rows, dr]
    void* nope;             // [heads, rows, d]
    void* rope;             // [rows, heads, dr]
    int64_t heads, d, dr, threads;
};

// The two parts of each head: one in the order that a product for each head takes, the other rotated.
template <class In, class F>
void query(const Query& c, int64_t begin, int64_t end, float* buffer) {
    const int64_t d = c.d, dr = c.dr, each = d + dr;
    float *pairs = buffer + d, *turned = pairs + dr;
    const F *cos = static_cast<const F*>(c.cos), *sin = static_cast<const F*>(c.sin);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / c.heads, head = i % c.heads;
        F* nope = static_cast<F*>(c.nope) + (head * c.q.rows + row) * d;
        if constexpr (std::is_same_v<In, F>) {
            std::memcpy(nope, static_cast<const F*>(c.q.data) + i * each, sizeof(F) * d);
            values<In>(c.q, row, head * each + d, dr, pairs);
        } else {
            values<In>(c.q, row, head * each, each, buffer);
            convert(buffer, nope, d);
        }
        rotate(pairs, cos + row * dr, sin + row * dr, turned, dr);
        convert(turned, static_cast<F*>(c.rope) + i * dr, dr);
    }
}

struct QuantizeQuery {
    const bf16* query;  // [rows, width]
    bf16* rope;         // [rows, dr], in place
    const float* factor;
    int8_t* y;     // [rows, width]
    float* scale;  // [rows]
    int64_t rows, width, dr, threads;
};

// y, scale = query, quantized for each row; rope times factor / scale.
void quantize_query(const QuantizeQuery& c, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        auto value = [&](int64_t j, auto... n) __attribute__((always_inline)) {
            return load_block<EvenOdd>(c.query + row * c.width + j, n...);
        };
        vi amax{};
        for_blocks(c.width, [&](int64_t j, auto... n) __attribute__((always_inline)) {
            amax = max(amax, magnitude(value(j, n...)));
        });
        c.scale[row] = symmetric_scale(amax);
        quantize_row<EvenOdd>(c.scale[row], c.y + row * c.width, c.width, value);
        const float times = *c.factor / c.scale[row];
        bf16* rope = c.rope + row * c.dr;
        for_blocks(c.dr, [&](int64_t j, auto... n) __attribute__((always_inline)) {
            store_block<EvenOdd>(rope + j, load_block<EvenOdd>(rope + j, n...) * times, n...);
        });
    }
}

}  // namespace
}  // namespace npu

NPU_KERNEL(mla_norm)(const npu::QueryNorm* c) {
    using namespace npu;
    const int64_t width = c->x.width;
    return with_product(c->x, c->type, [&](auto in, auto f) {
        return over_rows(c->x.rows, 4 * width, c->threads, width, [&](int64_t begin, int64_t end, float* buffer) {
            norm<decltype(in), decltype(f)>(*c, begin, end, buffer);
        });
    });
}

NPU_KERNEL(mla_query)(const npu::Query* c) {
    using namespace npu;
    const int64_t parts = c->q.rows * c->heads, floats = c->d + 2 * c->dr;
    return with_product(c->q, c->type, [&](auto in, auto f) {
        return over_rows(parts, 4 * floats, c->threads, floats, [&](int64_t begin, int64_t end, float* buffer) {
            query<decltype(in), decltype(f)>(*c, begin, end, buffer);
        });
    });
}

NPU_KERNEL(mla_quantize_query)(const npu::QuantizeQuery* c) {
    using namespace npu;
    return over_rows(c->rows, 2 * c->width, c->threads, 0, [&](int64_t begin, int64_t end, float*) {
        quantize_query(*c, begin, end);
    });
}
