// Every CPU kernel, compiled once per instruction set: kernels_<isa>.cpp names it, tells how many lanes it has and includes
// this.
// Only C headers, no std templates, internal linkage: nothing compiled here can be picked up by another level.

#include <stdint.h>
#include <string.h>
#if FASTSAMPLE_LANES > 1
#include <immintrin.h>
#endif

#include "kernels.h"

#define FS_INLINE static inline __attribute__((always_inline))

namespace fastsample {
namespace FASTSAMPLE_ISA {

#include "lanes.h"
#include "../common/philox.h"
#include "../common/normal.h"

// op(i, count) for i = 0, W, 2W, ...; count is W (a constant once inlined) but for a last, partial vector.
template <class Op>
FS_INLINE void each_vector(int64_t n, Op op) {
    int64_t i = 0;
    for (; i + W <= n; i += W) op(i, (int64_t)W);
    if (i < n) op(i, n - i);
}

FS_INLINE F load(const float* p, int64_t count) { return count == W ? load(p) : load_part(p, count); }
FS_INLINE void store(float* p, F v, int64_t count) { count == W ? store(p, v) : store_part(p, v, count); }

// Counters j .. j + W - 1 give normals 4j .. 4(j + W) - 1, written in order.
FS_INLINE void normal_group(float* out, uint64_t j, const RoundKeys& keys, uint32_t step, uint32_t stream) {
    const U low = splat((uint32_t)j) + lane_counters();
    const auto carried = low < splat((uint32_t)j);
    const U upper = carried ? splat((uint32_t)(j >> 32) + 1u) : splat((uint32_t)(j >> 32));
    const Words words = philox(Words{low, upper, splat(step), splat(stream)}, keys);
    F n0, n1, n2, n3;
    box_muller(words.w0, words.w1, n0, n1);
    box_muller(words.w2, words.w3, n2, n3);
    transpose_quads(n0, n1, n2, n3);
    store(out, n0);
    store(out + W, n1);
    store(out + 2 * W, n2);
    store(out + 3 * W, n3);
}

static void normals(float* out, int64_t first, int64_t count, uint64_t seed, uint32_t step, uint32_t stream) {
    const RoundKeys keys = round_keys(seed);
    const uint64_t j = (uint64_t)first / 4;
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W) normal_group(out + i, j + (uint64_t)i / 4, keys, step, stream);
    if (i < count) {
        float rest[4 * W];
        normal_group(rest, j + (uint64_t)i / 4, keys, step, stream);
        memcpy(out + i, rest, (size_t)(count - i) * sizeof(float));
    }
}

static void philox_words(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
    const Words words = philox(Words{splat(counter[0]), splat(counter[1]), splat(counter[2]), splat(counter[3])},
                               round_keys((uint64_t)key[1] << 32 | key[0]));
    memcpy(out, &words.w0, 4);
    memcpy(out + 1, &words.w1, 4);
    memcpy(out + 2, &words.w2, 4);
    memcpy(out + 3, &words.w3, 4);
}

// Sixteen-bit floats to float and back, a last partial vector through a padded buffer.
template <F (*Load)(const uint16_t*)>
static void from_16_bits(float* out, const uint16_t* in, int64_t n) {
    each_vector(n, [=](int64_t i, int64_t count) {
        uint16_t part[W] = {0};
        const uint16_t* from = in + i;
        if (count != W) from = (const uint16_t*)memcpy(part, from, (size_t)count * 2);
        store(out + i, Load(from), count);
    });
}

template <void (*Store)(uint16_t*, F)>
static void to_16_bits(uint16_t* out, const float* in, int64_t n) {
    each_vector(n, [=](int64_t i, int64_t count) {
        const F v = load(in + i, count);
        if (count == W) {
            Store(out + i, v);
        } else {
            uint16_t part[W];
            Store(part, v);
            memcpy(out + i, part, (size_t)count * 2);
        }
    });
}

struct Term {
    float c;
    const float* v;
};

// out = c[0] v[0], then one fma per further term; `out` may be one of the operands.
template <int K>
static void combine_terms(float* out, const Term* given, int64_t n) {
    Term t[K];
    for (int k = 0; k < K; ++k) t[k] = given[k];
    each_vector(n, [=](int64_t i, int64_t count) {
        F sum = load(t[0].v + i, count) * t[0].c;
        for (int k = 1; k < K; ++k) sum = fma(splat(t[k].c), load(t[k].v + i, count), sum);
        store(out + i, sum, count);
    });
}

struct Sum {
    Term terms[4];
    int used;
};

// An operand whose coefficient is 0 is not read.
FS_INLINE void add(Sum* sum, float c, const float* v) {
    if (c != 0.0f) sum->terms[sum->used++] = Term{c, v};
}

FS_INLINE void combine(float* out, const Sum* sum, int64_t n) {
    switch (sum->used) {
        case 0: memset(out, 0, (size_t)n * sizeof(float)); break;
        case 1: combine_terms<1>(out, sum->terms, n); break;
        case 2: combine_terms<2>(out, sum->terms, n); break;
        case 3: combine_terms<3>(out, sum->terms, n); break;
        default: combine_terms<4>(out, sum->terms, n); break;
    }
}

static void clamp(float* v, float limit, int64_t n) {
    each_vector(n, [=](int64_t i, int64_t count) {
        store(v + i, max_of(splat(-limit), min_of(splat(limit), load(v + i, count))), count);
    });
}

static void step_block(const StepArgs* args, int64_t sample, int64_t first, int64_t n) {
    alignas(64) float m_block[kBlock], z_block[kBlock], x0_block[kBlock];
    const Row row = *args->row;
    const bool limited = row.limit < __builtin_inff();
    const int64_t at = sample * args->size + first;
    const int64_t m_at = sample * args->m_stride + first;
    const float* x = args->x + at;

    const float* m = (const float*)args->m + m_at;
    if (args->m_dtype != kFloat32) {
        const uint16_t* half_m = (const uint16_t*)args->m + m_at;
        args->m_dtype == kFloat16 ? from_16_bits<load_half>(m_block, half_m, n)
                                  : from_16_bits<load_bits16>(m_block, half_m, n);
        m = m_block;
    }

    float* x0 = args->x0_out ? args->x0_out + at : x0_block;
    if (limited || args->x0_out) {
        Sum sum = {{}, 0};
        add(&sum, row.p, x);
        add(&sum, row.q, m);
        combine(x0, &sum, n);
        if (limited) clamp(x0, row.limit, n);
    }

    Sum sum = {{}, 0};
    if (limited) {
        add(&sum, row.d, m);
        add(&sum, row.b, x0);
        add(&sum, row.a, x);
    } else {
        add(&sum, row.folded_m, m);
        add(&sum, row.folded_x, x);
    }
    if (row.s != 0.0f) {
        const float* z = z_block;
        if (args->z) z = args->z + at;
        else normals(z_block, first, n, args->seeds[sample], args->noise_step, 1);
        add(&sum, row.s, z);
    }
    float* out = args->out + at;
    combine(out, &sum, n);

    if (args->input_out) {
        if (args->input_dtype == kFloat16) {
            to_16_bits<store_half>((uint16_t*)args->input_out + at, out, n);
        } else if (args->input_dtype == kBFloat16) {
            to_16_bits<store_bfloat>((uint16_t*)args->input_out + at, out, n);
        } else {
            memcpy((float*)args->input_out + at, out, (size_t)n * sizeof(float));
        }
    }
}

static void step(const StepArgs* args, int64_t begin, int64_t end) {
    const int64_t per_sample = (args->size + kBlock - 1) / kBlock;
    int64_t sample = begin / per_sample, block = begin % per_sample;
    for (int64_t k = begin; k < end; ++k) {
        const int64_t first = block * kBlock;
        const int64_t left = args->size - first;
        step_block(args, sample, first, left < kBlock ? left : kBlock);
        if (++block == per_sample) {
            block = 0;
            ++sample;
        }
    }
}

static void copy(float* out, const float* in, int64_t count) {
    each_vector(count, [=](int64_t i, int64_t n) { store(out + i, load(in + i, n), n); });
}

static void triad(float* y, const float* x, float a, float s, int64_t count) {
    each_vector(count, [=](int64_t i, int64_t n) {
        store(y + i, fma(splat(s), load(x + i, n), load(y + i, n) * a), n);
    });
}

const Kernels kernels = {step, normals, philox_words, copy, triad};

}  // namespace FASTSAMPLE_ISA
}  // namespace fastsample
