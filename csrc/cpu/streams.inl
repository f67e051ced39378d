// The lower bounds that benchmarks compare with: nothing but memory.

static void copy(float* out, const float* in, int64_t count) {
    each_vector(count, [=](int64_t i, int64_t n) FS_ALWAYS { store(out + i, load(in + i, n), n); });
}

// y = a*y + s*(x[0] + ... + x[K-1]).
template <int K>
static void add_streams(float* y, const float* const* x, float a, float s, int64_t first, int64_t count) {
    const float* in[K];
    for (int k = 0; k < K; ++k) in[k] = x[k] + first;
    float* out = y + first;
    each_vector(count, [=](int64_t i, int64_t n) FS_ALWAYS {
        F sum = load(in[0] + i, n);
        for (int k = 1; k < K; ++k) sum = sum + load(in[k] + i, n);
        store(out + i, fma(splat(s), sum, load(out + i, n) * a), n);
    });
}

static void triad(float* y, const float* const* x, int streams, float a, float s, int64_t first, int64_t count) {
    switch (streams) {
        case 1: add_streams<1>(y, x, a, s, first, count); break;
        case 2: add_streams<2>(y, x, a, s, first, count); break;
        case 3: add_streams<3>(y, x, a, s, first, count); break;
        case 4: add_streams<4>(y, x, a, s, first, count); break;
        default: add_streams<5>(y, x, a, s, first, count); break;
    }
}
