// The sampling step, what ops/step.py specifies: one pass over memory, a block at a time in L1. Moves 4 bytes an element for
// each of: x, m (2 for 16-bit floats, as all of m), its unconditional half under guidance, its variance half where g1 is not
// 0, h1 and h2 where c1 and c2 are not 0, given noise, x' and x0 where it is kept; and the next input's own size, once or
// twice, where one is made.

// One block's operands as floats, and one row's coefficients.
struct Block {
    const float *x, *m, *uncond;
    float guidance;
    float p, q, a, b, d;  // d and a are the folded coefficients where x0 is not limited
    float bound, divisor;
    const float* extra[3];  // h1, h2 and noise, those of them whose coefficient is not 0
    float c[3];
    float *out, *x0_out;
};

// x0 before it is limited.
FS_INLINE F estimate(const Block& k, F x, F m) {
    F x0 = splat(0.0f);
    if (k.p != 0.0f) x0 = fma(splat(k.p), x, x0);
    if (k.q != 0.0f) x0 = fma(splat(k.q), m, x0);
    return x0;
}

template <bool kGuided>
FS_INLINE F output(const Block& k, int64_t i, int64_t count) {
    const F m = load(k.m + i, count);
    if (!kGuided) return m;
    const F uncond = load(k.uncond + i, count);
    return fma(splat(k.guidance - 1.0f), m - uncond, m);  // exactly m at 1
}

// Which of x and m enter x' beside x0. With kSome any coefficient may be 0 and is asked for in the loop.
enum Reads { kSome, kX, kM, kXAndM };

// What a pass does, known when its loop is compiled: without a test in the loop, steps in cache run at the speed of the cache.
template <int kReads, bool kGuided, bool kLimited, bool kKeepsX0, int kExtra>
static void combine(const Block* block, int64_t n) {
    const Block k = *block;
    each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS {
        const F x = load(k.x + i, count), m = output<kGuided>(k, i, count);
        F extra[kExtra + 1];
        for (int e = 0; e < kExtra; ++e) extra[e] = load(k.extra[e] + i, count);
        F sum = splat(0.0f);
        if (kReads & kM || (kReads == kSome && k.d != 0.0f)) sum = fma(splat(k.d), m, sum);
        if (kLimited || kKeepsX0) {
            F x0 = kReads == kSome ? estimate(k, x, m) : fma(splat(k.q), m, x * k.p);
            if (kLimited) {
                x0 = max_of(splat(-k.bound), min_of(splat(k.bound), x0));
                if (kReads == kSome && k.divisor != 1.0f) x0 = x0 / k.divisor;
                if (kReads != kSome || k.b != 0.0f) sum = fma(splat(k.b), x0, sum);
            }
            // h1 or h2 may lie in the same place: they have been read.
            if (kKeepsX0) store(k.x0_out + i, x0, count);
        }
        if (kReads & kX || (kReads == kSome && k.a != 0.0f)) sum = fma(splat(k.a), x, sum);
        for (int e = 0; e < kExtra; ++e) sum = fma(splat(k.c[e]), extra[e], sum);
        store(k.out + i, sum, count);
    });
}

template <int kReads, bool... kFlags>
FS_INLINE void combine_extras(const Block* block, int extras, int64_t n) {
    switch (extras) {
        case 0: combine<kReads, kFlags..., 0>(block, n); break;
        case 1: combine<kReads, kFlags..., 1>(block, n); break;
        case 2: combine<kReads, kFlags..., 2>(block, n); break;
        default: combine<kReads, kFlags..., 3>(block, n); break;
    }
}

// Turns flags known at run time into template arguments, one after the other.
template <bool... kFlags>
FS_INLINE void combine_flags(const Block* block, int extras, int64_t n) {
    const Block& k = *block;
    const bool usual = k.p != 0.0f && k.q != 0.0f && k.b != 0.0f && k.divisor == 1.0f;
    const bool x = k.a != 0.0f, m = k.d != 0.0f;
    if (usual && x && m) combine_extras<kXAndM, kFlags...>(block, extras, n);
    else if (usual && x) combine_extras<kX, kFlags...>(block, extras, n);
    else if (usual && m) combine_extras<kM, kFlags...>(block, extras, n);
    else combine_extras<kSome, kFlags...>(block, extras, n);
}
template <bool... kFlags, class... Rest>
FS_INLINE void combine_flags(const Block* block, int extras, int64_t n, bool flag, Rest... rest) {
    flag ? combine_flags<kFlags..., true>(block, extras, n, rest...)
         : combine_flags<kFlags..., false>(block, extras, n, rest...);
}

FS_INLINE const Row& row_of(const StepArgs* args, int64_t sample) {
    return args->rows[args->row_of ? args->row_of[sample] : args->row];
}

// Noise is arithmetic: meanwhile memory fetches what the block will be combined with.
static void draw(float* z, const StepArgs* args, int64_t sample, int64_t first, int64_t n) {
    const uint32_t step = (uint32_t)(args->row_of ? args->row_of[sample] : args->row);
    const char* x = (const char*)(args->x + sample * args->size + first);
    const int64_t width = args->m_dtype == kFloat32 ? 4 : 2;
    const char* m = (const char*)args->m + (sample * args->m_stride + first) * width;
    const int64_t variance = row_of(args, sample).g1 != 0.0f ? args->size * width : 0;
    normals_and(z, first, n, args->seeds[sample], step, 1, [=](int64_t i) FS_ALWAYS {
        for (int64_t ahead = i; ahead < i + 4 * W; ahead += 16) {
            __builtin_prefetch(x + ahead * 4);
            __builtin_prefetch(m + ahead * width);
            if (variance) __builtin_prefetch(m + variance + ahead * width);
        }
    });
}

// z 2^(g1 v): the row holds g1 / ln 2.
static void scale_by_variance(float* z, float g1, const float* v, int64_t n) {
    each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS {
        store(z + i, load(z + i, count) * exp2_of(load(v + i, count) * g1), count);
    });
}

static void step_block(const StepArgs* args, int64_t sample, int64_t first, int64_t n) {
    alignas(64) float m_block[kBlock], uncond_block[kBlock], v_block[kBlock], z_block[kBlock];
    const Row row = row_of(args, sample);
    const int64_t at = sample * args->size + first, m_at = sample * args->m_stride + first;
    const float factor = args->factors ? args->factors[sample] : 1.0f;
    const bool limited = row.limit < __builtin_inff() || row.quantile > 0.0f;

    Block k = {};
    int extras = 0;
    const auto add = [&](float c, const float* operand) {
        if (c == 0.0f) return;
        k.c[extras] = c;
        k.extra[extras++] = operand;
    };
    add(row.c1, args->h1 ? args->h1 + at : nullptr);
    add(row.c2, args->h2 ? args->h2 + at : nullptr);
    if (row.s != 0.0f && (args->z || args->seeds)) {
        const bool learned = row.g1 != 0.0f;
        const float* z = args->z ? args->z + at : z_block;
        if (!args->z) draw(z_block, args, sample, first, n);
        if (learned) {
            if (args->z) memcpy(z_block, z, (size_t)n * sizeof(float));
            const float* v = as_floats(args->m, args->m_dtype, m_at + args->size, v_block, n);
            scale_by_variance(z_block, row.g1, v, n);
            z = z_block;
        }
        add(row.s, z);
    }

    k.x = args->x + at;
    k.m = as_floats(args->m, args->m_dtype, m_at, m_block, n);
    k.p = row.p;
    k.q = row.q * factor;
    k.a = limited ? row.a : row.folded_x;
    k.b = row.b;
    k.d = (limited ? row.d : row.folded_m) * factor;
    k.bound = args->bounds ? args->bounds[sample] : row.limit;
    k.divisor = args->bounds && row.quantile > 0.0f ? k.bound : 1.0f;
    k.out = args->out + at;
    k.x0_out = args->x0_out ? args->x0_out + at : nullptr;
    if (args->uncond) {
        k.uncond = as_floats(args->uncond, args->m_dtype, m_at, uncond_block, n);
        k.guidance = args->guidance[sample];
    }
    combine_flags(&k, extras, n, args->uncond != nullptr, limited, k.x0_out != nullptr);

    void* const inputs[2] = {args->input_out, args->second_input_out};
    for (void* input : inputs) {
        if (input) write_scaled(input, args->input_dtype, at, k.out, row.next_e, n);
    }
}

// How many blocks to take as one: many, where nothing is staged in L1 between memory and registers.
FS_INLINE int64_t blocks_at_once(const StepArgs* args) {
    if (args->m_dtype != kFloat32 || args->input_out || args->row_of) return 1;
    const Row& row = args->rows[args->row];
    const bool stages_noise = row.s != 0.0f && (args->seeds || args->z) && (!args->z || row.g1 != 0.0f);
    return stages_noise ? 1 : 64;
}

static void step(const StepArgs* args, int64_t begin, int64_t end) {
    const int64_t per_sample = (args->size + kBlock - 1) / kBlock, most = blocks_at_once(args);
    for (int64_t k = begin; k < end;) {
        const int64_t sample = k / per_sample, block = k % per_sample;
        int64_t blocks = per_sample - block < end - k ? per_sample - block : end - k;
        if (blocks > most) blocks = most;
        const int64_t first = block * kBlock, left = args->size - first;
        step_block(args, sample, first, left < blocks * kBlock ? left : blocks * kBlock);
        k += blocks;
    }
}
