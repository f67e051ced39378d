// What a block adds to the log density of what its sample's step draws: sums of z^2 and of the exponents g1 v / ln 2.

// As exp2_of bounds them.
static double sum_of_exponents(float g1, const void* v, int dtype, int64_t n) {
    alignas(64) float block[kBlock];
    with_dtype(dtype, [=, &block](auto type) FS_ALWAYS {
        each_vector(n, [=, &block](int64_t i, int64_t count) FS_ALWAYS {
            store(block + i, bounded_exponent(type.load(v, i, count) * g1), count);
        });
    });
    return sum_of(block, n);
}

// z: of a block that begins at `first`, before the variance scales it. v: its variance half, null where none is read.
static void add_to_log_prob(const StepArgs* args, int64_t sample, int64_t first, const float* z, float g1, const void* v,
                            int64_t n) {
    double* const sums = args->log_prob_sums + (sample * log_prob_parts(args->size) + first / kBlock) * 2;
    sums[0] = sum_of_products(z, z, n);
    sums[1] = v ? sum_of_exponents(g1, v, args->m_dtype, n) : 0.0;
}
