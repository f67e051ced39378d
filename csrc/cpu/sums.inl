// Sums of float32 values in 16 partial sums of doubles: the same order at every instruction set.

template <class Term>
FS_INLINE double sum_of_terms(int64_t n, Term term) {
    double lanes[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int lane = 0; lane < 16; ++lane) lanes[lane] += term(i + lane);
    for (int lane = 0; i + lane < n; ++lane) lanes[lane] += term(i + lane);
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
}

static double sum_of(const float* v, int64_t n) {
    return sum_of_terms(n, [=](int64_t i) FS_ALWAYS { return (double)v[i]; });
}

static double sum_of_products(const float* a, const float* b, int64_t n) {
    return sum_of_terms(n, [=](int64_t i) FS_ALWAYS { return (double)a[i] * (double)b[i]; });
}
