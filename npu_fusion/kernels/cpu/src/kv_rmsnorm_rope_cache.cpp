// Rows of keys and latents into their caches: npu_kv_rmsnorm_rope_cache, and the last steps of npu_mla_prolog.
// Formulas and traps: the files of these names in npu_fusion/meta_impls.
//
//     kv row ──▶ latent | pairs ──▶ rms_norm(latent) * factor ──▶ latent cache
//                                   rotate(pairs)             ──▶ rope cache
//
// A row is read once, and the caches are written nowhere else.
#include "cache.h"
#include "latent.h"
#include "rows.h"

namespace npu {
namespace {

// The order of the fields is that of ../_key_rows.py.
struct Call {
    Product kv;             // [rows, width + dr]
    int64_t type;           // of gamma, cos, sin and the outputs
    const void* gamma;      // [width]
    const void *cos, *sin;  // [rows, dr]
    int64_t width, dr;
    int64_t round_rope;  // whether the rotated row is rounded to `type` before it is quantized
    Pages pages;
    Cache latent, rope;
    void *latent_out, *rope_out;  // [rows, width] and [rows, dr], or null
    int64_t threads;
    double epsilon, factor;
};

template <class In, class F>
void write_rows(const Call& c, const Written& written, int64_t begin, int64_t end, float* buffer) {
    float *x = buffer, *pairs = x + c.width, *turned = pairs + c.dr;
    char* bytes = reinterpret_cast<char*>(turned + c.dr);
    const F *gamma = static_cast<const F*>(c.gamma), *cos = static_cast<const F*>(c.cos),
            *sin = static_cast<const F*>(c.sin);
    for (int64_t row = begin; row < end; ++row) {
        const bool writes = written.row(row);
        if (!writes && !c.latent_out) continue;
        values<In>(c.kv, row, 0, c.kv.width, x);
        normalize(x, gamma, c.epsilon, c.factor, c.width);
        rotate(pairs, cos + row * c.dr, sin + row * c.dr, turned, c.dr);
        if (c.latent_out) {
            convert(x, static_cast<F*>(c.latent_out) + row * c.width, c.width);
            convert(turned, static_cast<F*>(c.rope_out) + row * c.dr, c.dr);
        }
        if (!writes) continue;
        const int64_t slot = c.pages.slot(row);
        write_row<F>(c.latent, c.pages, slot, x, c.width, bytes);
        if (c.round_rope && c.rope.scale) {
            convert(turned, reinterpret_cast<F*>(bytes), c.dr);
            convert(reinterpret_cast<const F*>(bytes), turned, c.dr);
        }
        write_row<F>(c.rope, c.pages, slot, turned, c.dr, bytes);
    }
}

}  // namespace
}  // namespace npu

NPU_KERNEL(kv_rmsnorm_rope_cache)(const npu::Call* c) {
    using namespace npu;
    if (!c->pages.hold(c->kv.rows)) return REFUSED;
    const Written written(c->pages, c->kv.rows);
    if (!written.ok()) return NO_MEMORY;
    const int64_t floats = 2 * (c->width + 2 * c->dr);
    return with_product(c->kv, c->type, [&](auto in, auto f) {
        return over_rows(c->kv.rows, 4 * floats, c->threads, floats, [&](int64_t begin, int64_t end, float* buffer) {
            write_rows<decltype(in), decltype(f)>(*c, written, begin, end, buffer);
        });
    });
}
