// One thread's elements of a step, for step.cu and posterior.cu: the counterpart of ../cpu/step.inl, with the same
// bits. The row is known here alone, so what it asks for and the caller did not give is left out. Inside namespace
// fastsample::cuda.

// What a sample whose row does not exist gets: NaN wherever its elements are written.
alignas(16) static __device__ const Row kNoRow = {NAN, 0, NAN, 0, 0, 0, 0, 0, 0, 0, INFINITY, 0, NAN, 0, 1, 0};

// Negative where there is no such row.
FS_INLINE int64_t row_number(const DeviceStepArgs& args, int64_t sample) {
    if (!args.row_of) return args.row;
    const int64_t given = args.row_of[sample], number = given < 0 ? given + args.row_count : given;
    return number < args.row_count ? number : -1;
}

FS_INLINE Row load_row(const DeviceStepArgs& args, int64_t number) {
    const float4* const from = (const float4*)(number < 0 ? &kNoRow : args.rows + number);
    const float4 v0 = from[0], v1 = from[1], v2 = from[2], v3 = from[3];
    return Row{v0.x, v0.y, v0.z, v0.w, v1.x, v1.y, v1.z, v1.w, v2.x, v2.y, v2.z, v2.w, v3.x, v3.y, v3.z, 0};
}

// The model's output after guidance.
template <class T, int kCount>
FS_INLINE void load_output(const DeviceStepArgs& args, int64_t sample, int64_t first, int count, F* m) {
    const int64_t at = sample * args.m_stride + first;
    load<kCount>((const T*)args.m + at, count, m);
    if (args.uncond) {
        F uncond[kCount];
        load<kCount>((const T*)args.uncond + at, count, uncond);
        const float guidance = args.guidance[sample];
        for (int i = 0; i < kCount; ++i) m[i] = guide(guidance, m[i], uncond[i]);
    }
}

template <int kCount>
FS_INLINE void add(F* sum, float c, const float* operand, int count) {
    F v[kCount];
    load<kCount>(operand, count, v);
    for (int i = 0; i < kCount; ++i) sum[i] = fma(splat(c), v[i], sum[i]);
}

// Of a thread's elements: sums of z^2 and of g1 v / ln 2.
struct Drawn {
    float squares, exponents;
};

// kDraws: the noise may have to be drawn. kLearned: the row may scale it by the variance half of m. kBounds: there may
// be bounds. drawn: where the row draws it is written; null, known when it is compiled, where nobody asks.
template <class T, int kCount, bool kDraws, bool kLearned, bool kBounds>
FS_INLINE void step_elements(const DeviceStepArgs& args, int64_t sample, int64_t first, int count,
                             Drawn* drawn = nullptr) {
    // With eight elements a thread bounds of their own would be spilled.
    constexpr bool kBoxed = kCount == kPart;
    const int64_t number = row_number(args, sample), at = sample * args.size + first;
    Row row = load_row(args, number);
    F x[kCount], m[kCount], z[kCount];
    // With bounds, or a variance half of floats, x comes late: its registers would be spilled while noise is drawn.
    constexpr bool kLate = kBounds || (kDraws && kLearned && sizeof(T) == sizeof(float));
    if (!kLate) load<kCount>(args.x + at, count, x);
    load_output<T, kCount>(args, sample, first, count, m);
    const bool draws = kDraws && !args.z && args.keys, noisy = row.s != 0.0f && (args.z || draws);
    if (noisy) {
        const float g1 = row.g1;
        const bool learned = kLearned && g1 != 0.0f && args.m_stride != args.size;
        F v[kCount];
        if (learned) load<kCount>((const T*)args.m + sample * args.m_stride + args.size + first, count, v);
        if (drawn && learned) {
            F exponents = 0;
            for (int i = 0; i < kCount; ++i) exponents += i < count ? bounded_exponent(v[i] * g1) : 0;
            drawn->exponents = exponents;
        }
        if (draws) draw<kCount>(z, first, args.keys[sample], (uint32_t)number, 1);
        else load<kCount>(args.z + at, count, z);
        if (drawn) {
            F squares = 0;
            for (int i = 0; i < kCount; ++i) squares = i < count ? fma(z[i], z[i], squares) : squares;
            drawn->squares = squares;
        }
        if (learned)
            for (int i = 0; i < kCount; ++i) z[i] = scale_by_variance(z[i], g1, v[i]);
        // Read again, from cache: drawing needs the registers.
        asm volatile("" ::: "memory");
        row = load_row(args, number);
    }
    if (kLate) load<kCount>(args.x + at, count, x);
    const Coefficients k = coefficients(row, args.factors ? args.factors[sample] : 1.0f,
                                        kBounds && args.bounds ? args.bounds + sample : nullptr);
    F sum[kCount], x0[kCount];
    const bool limited = limits(row);
    if (kBoxed && limited && args.low) {
        F low[kCount], high[kCount];
        load<kCount>(args.low + first, count, low);
        load<kCount>(args.high + first, count, high);
        for (int i = 0; i < kCount; ++i) sum[i] = combine<kSome, true, true>(k, low[i], high[i], x[i], m[i], x0[i]);
    } else if (limited) {
        const F low = splat(-k.bound), high = splat(k.bound);
        for (int i = 0; i < kCount; ++i) sum[i] = combine<kSome, true, true>(k, low, high, x[i], m[i], x0[i]);
    } else {
        for (int i = 0; i < kCount; ++i) sum[i] = combine<kSome, false, true>(k, 0, 0, x[i], m[i], x0[i]);
    }
    if (args.h1 && row.c1 != 0.0f) add<kCount>(sum, row.c1, args.h1 + at, count);
    if (args.h2 && row.c2 != 0.0f) add<kCount>(sum, row.c2, args.h2 + at, count);
    if (args.h3 && row.c3 != 0.0f) add<kCount>(sum, row.c3, args.h3 + at, count);
    // A history may lie in the same place: it has been read.
    if (args.x0_out) {
        // As above: what makes the entry would be spilled meanwhile.
        asm volatile("" ::: "memory");
        const Row again = load_row(args, number);
        for (int i = 0; i < kCount; ++i) x0[i] = entry(again.hx, again.h0, x[i], x0[i]);
        store<kCount>(args.x0_out + at, count, x0);
    }
    if (noisy)
        for (int i = 0; i < kCount; ++i) sum[i] = fma(splat(row.s), z[i], sum[i]);
    store<kCount>(args.out + at, count, sum);
    void* const inputs[2] = {args.input_out, args.second_input_out};
    for (void* input : inputs) {
        if (input) store_scaled<kCount>(input, args.input_dtype, at, count, row.next_e, sum);
    }
}

// Whether every thread has kWhole elements, all of them aligned.
inline bool all_whole(const DeviceStepArgs& args) {
    const void* const operands[] = {args.x, args.m,   args.uncond, args.h1,        args.h2,    args.h3,
                                    args.z, args.out, args.x0_out, args.input_out, args.second_input_out};
    bool good = args.size % kWhole == 0 && args.m_stride % kWhole == 0;
    for (const void* operand : operands) good = good && aligned(operand);
    return good;
}
