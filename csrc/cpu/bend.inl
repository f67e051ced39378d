// Guidance by other methods than the plain one, what fastsample/ops/bend specifies: both halves of the model's output, and
// with momentum what moves, are read once for their sums and once to be combined.

// One block of a sample: the halves as floats, and the memory for those that are not.
struct Halves {
    alignas(64) float c_block[kBlock], u_block[kBlock];
    const float *c, *u;
};

FS_INLINE void load_halves(Halves* halves, const BendArgs* args, int64_t sample, int64_t first, int64_t n) {
    const int64_t at = sample * args->m_stride + first;
    halves->c = as_floats(element(args->cond, args->m_dtype, at), args->m_dtype, halves->c_block, n);
    halves->u = as_floats(element(args->uncond, args->m_dtype, at), args->m_dtype, halves->u_block, n);
}

// body(sample, block, first, n) for blocks [begin, end), numbered through all samples.
template <class Body>
FS_INLINE void each_bend_block(const BendArgs* args, int64_t begin, int64_t end, Body body) {
    const int64_t per_sample = (args->size + kBlock - 1) / kBlock;
    for (int64_t k = begin; k < end; ++k) {
        const int64_t first = k % per_sample * kBlock, left = args->size - first;
        body(k / per_sample, k, first, left < kBlock ? left : kBlock);
    }
}

static void bend_sums(const BendArgs* args, int64_t begin, int64_t end) {
    Halves halves;
    each_bend_block(args, begin, end, [&](int64_t sample, int64_t block, int64_t first, int64_t n) FS_ALWAYS {
        load_halves(&halves, args, sample, first, n);
        const float *c = halves.c, *u = halves.u;
        BendSums sums = {};
        sums.c = sum_of(c, n), sums.u = sum_of(u, n);
        sums.cc = sum_of_products(c, c, n), sums.uu = sum_of_products(u, u, n), sums.cu = sum_of_products(c, u, n);
        if (args->moved) {
            float* const d = args->moved + sample * args->size + first;
            const F momentum = splat(args->momentum);
            each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS {
                store(d + i, fma(momentum, load(d + i, count), load(c + i, count) - load(u + i, count)), count);
            });
            sums.d = sum_of(d, n), sums.dd = sum_of_products(d, d, n);
            sums.cd = sum_of_products(c, d, n), sums.ud = sum_of_products(u, d, n);
        }
        args->sums[block] = sums;
    });
}

static void bend(const BendArgs* args, int64_t begin, int64_t end) {
    Halves halves;
    each_bend_block(args, begin, end, [&](int64_t sample, int64_t, int64_t first, int64_t n) FS_ALWAYS {
        load_halves(&halves, args, sample, first, n);
        const float *c = halves.c, *u = halves.u, *share = args->shares + 3 * sample;
        const float* const d = args->moved ? args->moved + sample * args->size + first : nullptr;
        const float of_c = share[0], of_u = share[1], of_d = share[2];
        const int64_t at = sample * args->m_stride + first;
        float* const out = args->out + at;
        each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS {
            // What has no share is not read: it may be NaN.
            F m = load(c + i, count) * of_c;
            if (of_u != 0.0f) m = fma(splat(of_u), load(u + i, count), m);
            if (of_d != 0.0f) m = fma(splat(of_d), load(d + i, count), m);
            store(out + i, m, count);
        });
        if (args->m_stride == args->size) return;
        // The variance half is the conditional one's.
        const void* const v = element(args->cond, args->m_dtype, at + args->size);
        memcpy(out + args->size, as_floats(v, args->m_dtype, halves.c_block, n), (size_t)n * sizeof(float));
    });
}
