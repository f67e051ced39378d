// The sampling step, what fastsample/ops/step specifies: one pass over memory, in registers or a block at a time in L1. Moves 4
// bytes an element for each of: x, m (2 for 16-bit floats, as all of m), its unconditional half under guidance, its
// variance half where g1 is not 0, h1, h2 and h3 where c1, c2 and c3 are not 0, given noise, x' and the entry where it is
// kept; and the next input's own size, once or twice, where one is made.

// One block's operands, and its sample's coefficients.
struct Block {
    const float* x;
    const void *m, *uncond;  // of one dtype; floats, once they are staged. uncond: null where m is all there is
    float guidance;
    Coefficients k;
    const float* extra[4];  // h1, h2, h3 and noise, those of them whose coefficient is not 0
    float c[4];
    int extras;
    float *out, *x0_out;
    void* inputs[2];
    float scale;               // of the inputs
    const float *low, *high;  // what limits each element of x0; null where all have the same bound
};

template <int kReads, bool kLimited, bool kKeepsX0>
FS_INLINE F combine_alike(const Coefficients& k, F x, F m, F& x0) {
    return combine<kReads, kLimited, kKeepsX0>(k, splat(-k.bound), splat(k.bound), x, m, x0);
}

template <class M, bool kGuided>
FS_INLINE F output(const Block& block, int64_t i, int64_t count) {
    const F m = M::load(block.m, i, count);
    return kGuided ? between(block.guidance, m, M::load(block.uncond, i, count)) : m;
}

// What a pass does, known when its loop is compiled: without a test in the loop, steps in cache run at the speed of the cache.
template <int kReads, bool kGuided, bool kLimited, bool kKeepsX0, int kExtra>
static void combine_block(const Block* from, int64_t n) {
    const Block block = *from;
    each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS {
        const F x = load(block.x + i, count), m = output<Float, kGuided>(block, i, count);
        F extra[kExtra + 1];
        for (int e = 0; e < kExtra; ++e) extra[e] = load(block.extra[e] + i, count);
        F x0;
        F sum = combine_alike<kReads, kLimited, kKeepsX0>(block.k, x, m, x0);
        // A history may lie in the same place: it has been read.
        if (kKeepsX0) store(block.x0_out + i, entry(block.k.hx, block.k.h0, x, x0), count);
        for (int e = 0; e < kExtra; ++e) sum = fma(splat(block.c[e]), extra[e], sum);
        store(block.out + i, sum, count);
    });
}

// The same where each element has a low and a high of its own: floats, and everything is asked for.
static void combine_boxed(const Block* from, int64_t n) {
    const Block block = *from;
    each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS {
        const F x = load(block.x + i, count);
        const F m = block.uncond ? output<Float, true>(block, i, count) : output<Float, false>(block, i, count);
        F x0;
        F sum = combine<kSome, true, true>(block.k, load(block.low + i, count), load(block.high + i, count), x, m, x0);
        for (int e = 0; e < block.extras; ++e) sum = fma(splat(block.c[e]), load(block.extra[e] + i, count), sum);
        if (block.x0_out) store(block.x0_out + i, entry(block.k.hx, block.k.h0, x, x0), count);
        store(block.out + i, sum, count);
    });
}

template <int kReads, bool... kFlags>
FS_INLINE void combine_extras(const Block* block, int64_t n) {
    switch (block->extras) {
        case 0: combine_block<kReads, kFlags..., 0>(block, n); break;
        case 1: combine_block<kReads, kFlags..., 1>(block, n); break;
        case 2: combine_block<kReads, kFlags..., 2>(block, n); break;
        case 3: combine_block<kReads, kFlags..., 3>(block, n); break;
        default: combine_block<kReads, kFlags..., 4>(block, n); break;
    }
}

FS_INLINE int reads_of(const Coefficients& k) {
    const bool usual = k.p != 0.0f && k.q != 0.0f && k.b != 0.0f && k.divisor == 1.0f;
    return usual ? (k.a != 0.0f ? kX : kSome) | (k.d != 0.0f ? kM : kSome) : kSome;
}

// Turns flags known at run time into template arguments, one after the other.
template <bool... kFlags>
FS_INLINE void combine_flags(const Block* block, int64_t n) {
    switch (reads_of(block->k)) {
        case kXAndM: combine_extras<kXAndM, kFlags...>(block, n); break;
        case kX: combine_extras<kX, kFlags...>(block, n); break;
        case kM: combine_extras<kM, kFlags...>(block, n); break;
        default: combine_extras<kSome, kFlags...>(block, n); break;
    }
}
template <bool... kFlags, class... Rest>
FS_INLINE void combine_flags(const Block* block, int64_t n, bool flag, Rest... rest) {
    flag ? combine_flags<kFlags..., true>(block, n, rest...) : combine_flags<kFlags..., false>(block, n, rest...);
}

// The same where m, and the inputs that are written, are 16-bit floats. kUsual: no x0, nothing extra, and an input for each
// half of m, known when the loop is compiled; else each is asked for in the loop, two vectors at a time.
template <class M, int kReads, bool kGuided, bool kLimited, bool kUsual>
static void combine_16_bits(const Block* from, int64_t n) {
    const Block block = *from;
    uint16_t *const input = (uint16_t*)block.inputs[0], *const second = (uint16_t*)block.inputs[1];
    const bool first_too = kUsual || input, second_too = kUsual ? kGuided : second != nullptr;
    const bool scaled = block.scale != 1.0f;
    const auto next = [=](int64_t i, int64_t count) FS_ALWAYS {
        const F x = load(block.x + i, count), m = output<M, kGuided>(block, i, count);
        F x0;
        F sum = combine_alike<kReads, kLimited, !kUsual>(block.k, x, m, x0);
        if (!kUsual) {
            for (int e = 0; e < block.extras; ++e) sum = fma(splat(block.c[e]), load(block.extra[e] + i, count), sum);
            if (block.x0_out) store(block.x0_out + i, entry(block.k.hx, block.k.h0, x, x0), count);
        }
        store(block.out + i, sum, count);
        return scaled ? sum * block.scale : sum;
    };
    each_pair(
        n,
        [=](int64_t i) FS_ALWAYS {
            const F a = next(i, W), b = next(i + W, W);
            if (!first_too) return;
            const Pair packed = M::pack(a, b);
            store_pair(input + i, packed);
            if (second_too) store_pair(second + i, packed);
        },
        [=](int64_t i, int64_t count) FS_ALWAYS {
            const F v = next(i, count);
            if (first_too) M::store(input, i, v, count);
            if (second_too) M::store(second, i, v, count);
        });
}

// False where no loop is compiled for what this pass does.
template <class M, bool kGuided>
FS_INLINE bool combine_16_bits(const Block* block, int64_t n, bool limited) {
    const int reads = reads_of(block->k);
    const bool inputs = block->inputs[0] && (block->inputs[1] != nullptr) == kGuided;
    const bool usual = inputs && !block->x0_out && !block->extras;
    if (!limited && reads == kXAndM) {
        usual ? combine_16_bits<M, kXAndM, kGuided, false, true>(block, n)
              : combine_16_bits<M, kXAndM, kGuided, false, false>(block, n);
        return true;
    }
    if (!limited || !usual) return false;
    switch (reads) {
        case kXAndM: combine_16_bits<M, kXAndM, kGuided, true, true>(block, n); return true;
        case kX: combine_16_bits<M, kX, kGuided, true, true>(block, n); return true;
        case kM: combine_16_bits<M, kM, kGuided, true, true>(block, n); return true;
        default: return false;
    }
}

// The model's output at this element: both halves under guidance, but the one alone that a weight of 1 or 0 leaves.
FS_INLINE void point_at_output(Block* block, const StepArgs* args, int64_t sample, int64_t at) {
    block->m = element(args->m, args->m_dtype, at);
    block->uncond = nullptr;
    if (!args->uncond) return;
    block->guidance = args->guidance[sample];
    const void* uncond = element(args->uncond, args->m_dtype, at);
    if (block->guidance == 0.0f) block->m = uncond;
    else if (block->guidance != 1.0f) block->uncond = uncond;
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
    normals_and(z, first, n, args->keys[sample], step, 1, [=](int64_t i) FS_ALWAYS {
        for (int64_t ahead = i; ahead < i + 4 * W; ahead += 16) {
            __builtin_prefetch(x + ahead * 4);
            __builtin_prefetch(m + ahead * width);
            if (variance) __builtin_prefetch(m + variance + ahead * width);
        }
    });
}

static void scale_noise(float* z, float g1, const void* v, int dtype, int64_t n) {
    with_dtype(dtype, [=](auto type) FS_ALWAYS {
        each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS {
            store(z + i, scale_by_variance(load(z + i, count), g1, type.load(v, i, count)), count);
        });
    });
}

// Noise that is not just read from memory lies in L1 for a while.
FS_INLINE bool stages_noise(const StepArgs* args, const Row& row) {
    return row.s != 0.0f && (args->z ? row.g1 != 0.0f : args->keys != nullptr);
}

// Whether nothing but x, m and history is read, m and the inputs are of one 16-bit dtype, and vectors are registers. Noise
// takes longer than m's way through L1, and loops of one lane are better left to the compiler, in stages.
FS_INLINE bool may_convert_in_registers(const StepArgs* args, const Row& row) {
    if (W == 1 || args->m_dtype == kFloat32 || (args->input_out && args->input_dtype != args->m_dtype)) return false;
    return !args->factors && !args->bounds && !args->low && !stages_noise(args, row);
}

// False where the pass has to go through L1.
FS_INLINE bool combine_in_registers(const StepArgs* args, const Row& row, const Block* block, int64_t n) {
    if (!may_convert_in_registers(args, row)) return false;
    const bool limited = limits(row);
    if (args->m_dtype == kFloat16)
        return block->uncond ? combine_16_bits<Half, true>(block, n, limited)
                             : combine_16_bits<Half, false>(block, n, limited);
    return block->uncond ? combine_16_bits<Bfloat, true>(block, n, limited)
                         : combine_16_bits<Bfloat, false>(block, n, limited);
}

static void combine_staged(const StepArgs* args, const Row& row, Block* block, int64_t n) {
    alignas(64) float m_block[kBlock], uncond_block[kBlock];
    block->m = as_floats(block->m, args->m_dtype, m_block, n);
    if (block->uncond) block->uncond = as_floats(block->uncond, args->m_dtype, uncond_block, n);
    if (block->low) combine_boxed(block, n);
    else combine_flags(block, n, block->uncond != nullptr, limits(row), block->x0_out != nullptr);
    for (void* input : block->inputs)
        if (input) write_scaled(input, args->input_dtype, block->out, block->scale, n);
}

static void step_block(const StepArgs* args, int64_t sample, int64_t first, int64_t n) {
    alignas(64) float z_block[kBlock];
    const Row row = row_of(args, sample);
    const int64_t at = sample * args->size + first, m_at = sample * args->m_stride + first;
    const int dtype = args->m_dtype;

    Block block = {};
    const auto add = [&](float c, const float* operand) {
        if (c == 0.0f) return;
        block.c[block.extras] = c;
        block.extra[block.extras++] = operand;
    };
    add(row.c1, args->h1 ? args->h1 + at : nullptr);
    add(row.c2, args->h2 ? args->h2 + at : nullptr);
    add(row.c3, args->h3 ? args->h3 + at : nullptr);
    if (row.s != 0.0f && (args->z || args->keys)) {
        const bool learned = row.g1 != 0.0f;
        const float* z = args->z ? args->z + at : z_block;
        if (!args->z) draw(z_block, args, sample, first, n);
        const void* const v = learned ? element(args->m, dtype, m_at + args->size) : nullptr;
        if (args->log_prob_sums) add_to_log_prob(args, sample, first, z, row.g1, v, n);
        if (learned) {
            if (args->z) memcpy(z_block, z, (size_t)n * sizeof(float));
            scale_noise(z_block, row.g1, v, dtype, n);
            z = z_block;
        }
        add(row.s, z);
    }

    block.x = args->x + at;
    point_at_output(&block, args, sample, m_at);
    block.k = coefficients(row, args->factors ? args->factors[sample] : 1.0f,
                           args->bounds ? args->bounds + sample : nullptr);
    block.out = args->out + at;
    block.x0_out = args->x0_out ? args->x0_out + at : nullptr;
    if (args->input_out) block.inputs[0] = element(args->input_out, args->input_dtype, at);
    if (args->second_input_out) block.inputs[1] = element(args->second_input_out, args->input_dtype, at);
    block.scale = row.next_e;
    if (args->low && limits(row)) {
        block.low = args->low + first;
        block.high = args->high + first;
    }
    if (combine_in_registers(args, row, &block, n)) return;
    if (dtype == kFloat32 || n <= kBlock) return combine_staged(args, row, &block, n);
    for (int64_t done = 0; done < n; done += kBlock)
        step_block(args, sample, first + done, n - done < kBlock ? n - done : kBlock);
}

// How many blocks to take as one: many, where nothing is staged in L1 between memory and registers.
FS_INLINE int64_t blocks_at_once(const StepArgs* args) {
    if (args->row_of || args->log_prob_sums) return 1;
    const Row& row = args->rows[args->row];
    const bool floats = args->m_dtype == kFloat32 && !args->input_out && !stages_noise(args, row);
    return floats || may_convert_in_registers(args, row) ? 64 : 1;
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
