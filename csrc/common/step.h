// The arithmetic of one step, what fastsample/ops/step specifies, on a vector of elements. On the includer's lanes, inside its
// namespace, after exp2.h.

// One sample's coefficients: those of its row, with what is per sample worked in.
struct Coefficients {
    float p, q, a, b, d, hx, h0;
    float bound, divisor;
};

FS_INLINE bool limits(const Row& row) { return row.limit < __builtin_inff() || row.quantile > 0.0f; }

// What has no coefficient keeps none: a factor may be NaN.
FS_INLINE float times_factor(float coefficient, float factor) { return coefficient != 0.0f ? coefficient * factor : 0.0f; }

// factor: of m. bound: of |x0|, where a reduction found one.
FS_INLINE Coefficients coefficients(const Row& row, float factor, const float* bound) {
    Coefficients k;
    k.p = row.p;
    k.q = times_factor(row.q, factor);
    k.a = row.a;
    k.b = row.b;
    k.d = times_factor(row.d, factor);
    k.hx = row.hx;
    k.h0 = row.h0;
    k.bound = bound ? *bound : row.limit;
    k.divisor = bound && row.quantile > 0.0f ? k.bound : 1.0f;
    return k;
}

FS_INLINE F between(float guidance, F m, F uncond) { return fma(splat(guidance - 1.0f), m - uncond, m); }

// Exactly m at 1 and uncond at 0, where the other's coefficient is 0.
FS_INLINE F guide(float guidance, F m, F uncond) {
    return guidance == 1.0f ? m : guidance == 0.0f ? uncond : between(guidance, m, uncond);
}

// z 2^(g1 v): the row holds g1 / ln 2.
FS_INLINE F scale_by_variance(F z, float g1, F v) { return z * exp2_of(v * g1); }

// x0 before it is limited. An operand whose coefficient is 0 does not enter: a NaN in it is harmless.
FS_INLINE F estimate(float p, float q, F x, F m) {
    F x0 = splat(0.0f);
    if (p != 0.0f) x0 = fma(splat(p), x, x0);
    if (q != 0.0f) x0 = fma(splat(q), m, x0);
    return x0;
}

// What later rows read of this one: x0 itself where hx is 0 and h0 is 1, as where it is not limited.
FS_INLINE F entry(float hx, float h0, F x, F x0) {
    const F h = h0 != 0.0f ? x0 * h0 : splat(0.0f);
    return hx != 0.0f ? fma(splat(hx), x, h) : h;
}

// Which of x and m enter x' beside x0, known when a loop is compiled. With kSome any coefficient may be 0 and is asked
// for.
enum Reads { kSome, kX, kM, kXAndM };

// x' but for its history and its noise. x0 is set where it is limited, to [low, high], or kept.
template <int kReads, bool kLimited, bool kKeepsX0>
FS_INLINE F combine(const Coefficients& k, F low, F high, F x, F m, F& x0) {
    F sum = splat(0.0f);
    if (kReads & kM || (kReads == kSome && k.d != 0.0f)) sum = fma(splat(k.d), m, sum);
    if (kLimited || kKeepsX0) {
        x0 = kReads == kSome ? estimate(k.p, k.q, x, m) : fma(splat(k.q), m, fma(splat(k.p), x, splat(0.0f)));
        if (kLimited) {
            x0 = max_of(low, min_of(high, x0));
            if (kReads == kSome && k.divisor != 1.0f) x0 = divide(x0, k.divisor);
            if (kReads != kSome || k.b != 0.0f) sum = fma(splat(k.b), x0, sum);
        }
    }
    if (kReads & kX || (kReads == kSome && k.a != 0.0f)) sum = fma(splat(k.a), x, sum);
    return sum;
}
