// What a step needs to know of whole samples first: the guidance rescale's factor and the dynamic threshold. One thread
// takes a sample from its first element to its last, so results do not depend on how many threads there are.

// Calls body(block, first, n) with the operands of each block of the sample, m as floats; p and q are those of the row.
template <class Body>
FS_INLINE void each_block(const StepArgs* args, int64_t sample, Body body) {
    alignas(64) float m_block[kBlock], uncond_block[kBlock];
    Block block = {};
    block.k = coefficients(row_of(args, sample), args->factors ? args->factors[sample] : 1.0f, nullptr);
    block.guidance = args->uncond ? args->guidance[sample] : 1.0f;
    for (int64_t first = 0; first < args->size; first += kBlock) {
        const int64_t left = args->size - first, n = left < kBlock ? left : kBlock;
        const int64_t m_at = sample * args->m_stride + first;
        block.x = args->x + sample * args->size + first;
        block.m = as_floats(element(args->m, args->m_dtype, m_at), args->m_dtype, m_block, n);
        if (args->uncond)
            block.uncond = as_floats(element(args->uncond, args->m_dtype, m_at), args->m_dtype, uncond_block, n);
        body(block, first, n);
    }
}

FS_INLINE F guided_output(const Block& block, int64_t i, int64_t count) {
    const F m = Float::load(block.m, i, count);
    return block.uncond ? guide(block.guidance, m, Float::load(block.uncond, i, count)) : m;
}

// Sums about the first value, in 16 partial sums of doubles: the same order at every instruction set, and exactly 0 for a
// constant.
struct Moments {
    double origin, sum[16], square[16];
};

FS_INLINE void accumulate(Moments* moments, const float* v, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t count = n - i < 16 ? n - i : 16;
        for (int64_t lane = 0; lane < count; ++lane) {
            const double centred = (double)v[i + lane] - moments->origin;
            moments->sum[lane] += centred;
            moments->square[lane] += centred * centred;
        }
    }
}

FS_INLINE double deviations(const Moments& moments, int64_t n) {
    double sum = 0, square = 0;
    for (int lane = 0; lane < 16; ++lane) {
        sum += moments.sum[lane];
        square += moments.square[lane];
    }
    const double left = square - sum * sum / (double)n;
    return left < 0 ? 0 : left;  // NaN stays NaN
}

// Reads both halves of m.
static float rescale_factor(const StepArgs* args, int64_t sample, float phi) {
    alignas(64) float guided[kBlock];
    Moments conditional = {}, combined = {};
    each_block(args, sample, [&](const Block& block, int64_t first, int64_t n) FS_ALWAYS {
        each_vector(n, [&](int64_t i, int64_t count) FS_ALWAYS {
            store(guided + i, guided_output(block, i, count), count);
        });
        if (first == 0) {
            conditional.origin = *(const float*)block.m;
            combined.origin = guided[0];
        }
        accumulate(&conditional, (const float*)block.m, n);
        accumulate(&combined, guided, n);
    });
    const double of_m = deviations(combined, args->size), of_conditional = deviations(conditional, args->size);
    if (of_m == 0) return 1.0f;
    return (float)(phi * __builtin_sqrt(of_conditional / of_m) + (1.0 - phi));
}

typedef uint32_t Bits __attribute__((may_alias));

// The value of rank k (from 0) among n non-negative floats, given as their bits, which order alike; `through` counts the
// values up to and including it. Three histograms, of 11, 10 and 10 bits.
static uint32_t ranked(const Bits* bits, int64_t n, int64_t k, int64_t* through) {
    static const int shifts[4] = {31, 20, 10, 0};
    uint32_t prefix = 0;
    int64_t below = 0;
    for (int digit = 1; digit <= 3; ++digit) {
        const int shift = shifts[digit], above = shifts[digit - 1];
        const uint32_t mask = (1u << (above - shift)) - 1u;
        int64_t histogram[2048] = {0};
        for (int64_t i = 0; i < n; ++i) histogram[bits[i] >> shift & mask] += bits[i] >> above == prefix;
        uint32_t bucket = 0;
        while (below + histogram[bucket] <= k) below += histogram[bucket++];
        prefix = prefix << (above - shift) | bucket;
        if (digit == 3) *through = below + histogram[bucket];
    }
    return prefix;
}

static float bits_to_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

// r = clamp(quantile of |x0|, 1, limit), interpolated in float32 as torch.quantile does. NaN where x0 holds one and
// where r would be infinite. The limit itself in a row without a quantile. Reads x and m, writes |x0| and reads it four
// or five times.
static float threshold(const StepArgs* args, int64_t sample, float* scratch) {
    const Row row = row_of(args, sample);
    if (row.quantile == 0.0f) return row.limit;
    bool found_nan = false;
    each_block(args, sample, [&](const Block& block, int64_t first, int64_t n) FS_ALWAYS {
        each_vector(n, [&](int64_t i, int64_t count) FS_ALWAYS {
            const F x0 = estimate(block.k.p, block.k.q, load(block.x + i, count), guided_output(block, i, count));
            store(scratch + first + i, as_float(as_bits(x0) & 0x7fffffffu), count);
        });
        const Bits* bits = (const Bits*)scratch + first;
        for (int64_t i = 0; i < n; ++i) found_nan |= bits[i] > 0x7f800000u;
    });
    if (found_nan) return __builtin_nanf("");
    const Bits* bits = (const Bits*)scratch;
    const int64_t n = args->size;
    const float rank = row.quantile * (float)(n - 1);
    const int64_t lower = (int64_t)rank < n ? (int64_t)rank : n - 1;
    int64_t through;
    const uint32_t low = ranked(bits, n, lower, &through);
    const float weight = rank - (float)lower;
    uint32_t high = low;
    if (weight > 0 && through <= lower + 1 && lower + 1 < n) {
        high = 0x7f800000u;
        for (int64_t i = 0; i < n; ++i)
            if (bits[i] > low && bits[i] < high) high = bits[i];
    }
    const float a = bits_to_float(low), b = bits_to_float(high);
    const float between = weight < 0.5f ? __builtin_fmaf(weight, b - a, a) : __builtin_fmaf(weight - 1.0f, b - a, b);
    const float bounded = between < 1.0f ? 1.0f : between;
    const float r = bounded > row.limit ? row.limit : bounded;
    return r < __builtin_inff() ? r : __builtin_nanf("");
}
