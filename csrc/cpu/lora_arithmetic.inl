// How one dtype of weights is multiplied: what a word of x is, and one step along k of a tile of R rows and V vectors of
// columns. Words of x are floats, with AVX512-BF16 pairs of bfloat16.

#if FASTSAMPLE_LANES > 1
typedef F Lanes;
constexpr int kLanes = W;
FS_INLINE Lanes spread(float v) { return splat(v); }
FS_INLINE Lanes add_product(Lanes a, Lanes b, Lanes c) { return fma(a, b, c); }
FS_INLINE Lanes halves(const uint16_t* p) { return load_half(p); }
FS_INLINE void put_half(uint16_t* p, Lanes v) { store_half(p, v); }
FS_INLINE void put_bfloat(uint16_t* p, Lanes v) { store_bfloat(p, v); }
#else
// Four lanes by the compiler's own vectors, and two roundings: without an fma instruction one would be a function call.
typedef float Lanes __attribute__((vector_size(16)));
constexpr int kLanes = 4;
FS_INLINE Lanes spread(float v) { return Lanes{v, v, v, v}; }
FS_INLINE Lanes add_product(Lanes a, Lanes b, Lanes c) { return a * b + c; }
FS_INLINE Lanes halves(const uint16_t* p) { return Lanes{load_half(p), load_half(p + 1), load_half(p + 2), load_half(p + 3)}; }
FS_INLINE void put_half(uint16_t* p, Lanes v) {
    for (int i = 0; i < kLanes; ++i) store_half(p + i, v[i]);
}
FS_INLINE void put_bfloat(uint16_t* p, Lanes v) {
    for (int i = 0; i < kLanes; ++i) store_bfloat(p + i, v[i]);
}
#endif
typedef uint32_t LaneBits __attribute__((vector_size(kLanes * 4)));

template <class T>
FS_INLINE T take(const void* p) {
    T v;
    __builtin_memcpy(&v, p, sizeof(T));
    return v;
}
FS_INLINE void leave(void* p, Lanes v) { __builtin_memcpy(p, &v, sizeof v); }

// Most rows of a tile: 14 x 2 vectors of sums, 2 of weights and 1 of x fill 32 registers, 6 x 2 fill 16.
constexpr int kTileRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;

// Sums that hide the latency of an fma on every CPU and leave registers for its operands.
constexpr int kSums = kLanes == 16 ? 16 : 12;

// acc[r][v] += x[r] * w[v]
template <class A, int R, int V>
FS_INLINE void add_outer(Lanes (&acc)[R][V], const uint32_t* x, const Lanes (&w)[V]) {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
        const Lanes one = spread(take<float>(x + r * kPitch));
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r][v] = A::multiply_add(one, w[v], acc[r][v]);
    }
}

// A row's vectors one after the other.
template <class A, int V>
FS_INLINE void store_each(void* out, int i, const Lanes (&row)[V]) {
    for (int v = 0; v < V; ++v) A::store(out, i + v * kLanes, row[v]);
}

// float32 and, converted as they are read, float16 weights.
template <bool Half>
struct FloatWords {
    static constexpr int word_values = 1;
    static constexpr int step_words = 1, out_bytes = Half ? 2 : 4;
    static constexpr int column_bytes = out_bytes;  // of one step in one column
    // The low-rank part gets sums of its own: in float32 adding it to a long sum term by term would lose more than it
    // loses itself. Where the result is rounded to 16 bits that does not show.
    static constexpr bool separate = !Half;

    static int64_t words(int64_t k) { return k; }

    static void pack(uint32_t* to, const char* row, int64_t first, int64_t count, int64_t) {
        if (Half) {
            const uint16_t* from = (const uint16_t*)row + first;
            int64_t i = 0;
            for (; i + kLanes <= count; i += kLanes) leave(to + i, halves(from + i));
            uint16_t rest[kLanes] = {0};
            memcpy(rest, from + i, (size_t)(count - i) * 2);
            const Lanes last = halves(rest);
            memcpy(to + i, &last, (size_t)(count - i) * 4);
        } else {
            memcpy(to, (const float*)row + first, (size_t)count * 4);
        }
    }
    static inline FS_ALWAYS Lanes multiply_add(Lanes x, Lanes w, Lanes acc) { return add_product(x, w, acc); }
    template <int R, int V>
    static inline FS_ALWAYS void step(Lanes (&acc)[R][V], const uint32_t* x, const char* w) {
        Lanes columns[V];
        for (int v = 0; v < V; ++v)
            columns[v] = Half ? halves((const uint16_t*)w + v * kLanes) : take<Lanes>((const float*)w + v * kLanes);
        add_outer<FloatWords, R, V>(acc, x, columns);
    }
    static inline FS_ALWAYS void store(void* out, int i, Lanes v) {
        Half ? put_half((uint16_t*)out + i, v) : leave((float*)out + i, v);
    }
    template <int V>
    static inline FS_ALWAYS void store(void* out, int i, const Lanes (&row)[V]) {
        store_each<FloatWords>(out, i, row);
    }
};

// bfloat16 weights in float arithmetic: two words of x a step, the lower and the upper half of a pair of weights.
struct BfloatAsFloat {
    static constexpr int word_values = 1;
    static constexpr bool separate = false;
    static constexpr int step_words = 2, column_bytes = 4, out_bytes = 2;

    static int64_t words(int64_t k) { return k + (k & 1); }

    static void pack(uint32_t* to, const char* row, int64_t first, int64_t count, int64_t depth) {
        const uint16_t* from = (const uint16_t*)row + first;
        const int64_t present = first + count > depth ? depth - first : count;
        for (int64_t i = 0; i < present; ++i) to[i] = (uint32_t)from[i] << 16;
        for (int64_t i = present; i < count; ++i) to[i] = 0;
    }
    static inline FS_ALWAYS Lanes multiply_add(Lanes x, Lanes w, Lanes acc) { return add_product(x, w, acc); }
    template <int R, int V>
    static inline FS_ALWAYS void step(Lanes (&acc)[R][V], const uint32_t* x, const char* w) {
        Lanes columns[V];
        for (int v = 0; v < V; ++v) columns[v] = (Lanes)(take<LaneBits>(w + v * kLanes * 4) << 16);
        add_outer<BfloatAsFloat, R, V>(acc, x, columns);
        for (int v = 0; v < V; ++v) columns[v] = (Lanes)(take<LaneBits>(w + v * kLanes * 4) & 0xffff0000u);
        add_outer<BfloatAsFloat, R, V>(acc, x + 1, columns);
    }
    static inline FS_ALWAYS void store(void* out, int i, Lanes v) { put_bfloat((uint16_t*)out + i, v); }
    template <int V>
    static inline FS_ALWAYS void store(void* out, int i, const Lanes (&row)[V]) {
        store_each<BfloatAsFloat>(out, i, row);
    }
};

#ifdef FASTSAMPLE_BF16
// The instruction that multiplies pairs of bfloat16 and adds both products to a float. It takes subnormals for 0.
struct BfloatPairs {
    static constexpr int word_values = 2;
    static constexpr bool separate = false;
    static constexpr int step_words = 1, column_bytes = 4, out_bytes = 2;

    static int64_t words(int64_t k) { return (k + 1) / 2; }

    static void pack(uint32_t* to, const char* row, int64_t first, int64_t count, int64_t depth) {
        const int64_t present = 2 * (first + count) > depth ? depth - 2 * first : 2 * count;
        if (present < 2 * count) to[count - 1] = 0;
        memcpy(to, (const uint16_t*)row + 2 * first, (size_t)present * 2);
    }
    static inline FS_ALWAYS Lanes multiply_add(Lanes x, Lanes w, Lanes acc) {
        return (Lanes)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
    }
    template <int R, int V>
    static inline FS_ALWAYS void step(Lanes (&acc)[R][V], const uint32_t* x, const char* w) {
        Lanes columns[V];
        for (int v = 0; v < V; ++v) columns[v] = take<Lanes>(w + v * kLanes * 4);
        add_outer<BfloatPairs, R, V>(acc, x, columns);
    }
    static inline FS_ALWAYS void store(void* out, int i, Lanes v) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
        __builtin_memcpy((uint16_t*)out + i, &rounded, sizeof rounded);
    }
    static inline FS_ALWAYS void store(void* out, int i, const Lanes (&v)[2]) {
        const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
        __builtin_memcpy((uint16_t*)out + i, &rounded, sizeof rounded);
    }
    static inline FS_ALWAYS void store(void* out, int i, const Lanes (&v)[1]) { store(out, i, v[0]); }
};
#endif
