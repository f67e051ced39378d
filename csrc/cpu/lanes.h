// The lanes of one instruction set: F, U and I are W floats, unsigned and signed ints; operators +, -, *, &, ^, <<, >>
// and ?: are the compiler's own on all three. Included inside the instruction set's namespace.
// Only what is used differs; everything above this file is written once.

#if FASTSAMPLE_LANES == 16

constexpr int W = 16;
typedef float F __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));

FS_INLINE F splat(float v) { return (F)_mm512_set1_ps(v); }
FS_INLINE U splat(uint32_t v) { return (U)_mm512_set1_epi32((int)v); }
FS_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FS_INLINE F square_root(F a) { return (F)_mm512_sqrt_ps((__m512)a); }
FS_INLINE F to_float(I a) { return (F)_mm512_cvtepi32_ps((__m512i)a); }
// Both return the second operand where one is NaN, so a NaN in it survives.
FS_INLINE F min_of(F bound, F v) { return (F)_mm512_min_ps((__m512)bound, (__m512)v); }
FS_INLINE F max_of(F bound, F v) { return (F)_mm512_max_ps((__m512)bound, (__m512)v); }
// Words of even lanes and of odd lanes.
struct Wide {
    __m512i even, odd;
};
FS_INLINE Wide widen(U v) { return Wide{(__m512i)v, _mm512_srli_epi64((__m512i)v, 32)}; }
FS_INLINE U narrow(Wide v) { return (U)_mm512_mask_shuffle_epi32(v.even, 0xAAAA, v.odd, _MM_PERM_CDAB); }
FS_INLINE Wide multiply(Wide v, uint32_t factor) {
    const __m512i f = _mm512_set1_epi32((int)factor);
    return Wide{_mm512_mul_epu32(v.even, f), _mm512_mul_epu32(v.odd, f)};
}
FS_INLINE Wide high(Wide v) { return Wide{_mm512_srli_epi64(v.even, 32), _mm512_srli_epi64(v.odd, 32)}; }
FS_INLINE Wide xor3(Wide a, Wide b, uint32_t key) {
    const __m512i k = _mm512_set1_epi32((int)key);
    return Wide{_mm512_ternarylogic_epi32(a.even, b.even, k, 0x96), _mm512_ternarylogic_epi32(a.odd, b.odd, k, 0x96)};
}
FS_INLINE F load(const float* p) { return (F)_mm512_loadu_ps(p); }
FS_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, (__m512)v); }
FS_INLINE F load_half(const uint16_t* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FS_INLINE void store_half(uint16_t* p, F v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
typedef uint16_t H __attribute__((vector_size(64)));
// One shuffle that widens and shifts: halfword k goes to the upper half of lane k.
FS_INLINE F load_bits16(const uint16_t* p) {
    const H to_upper = {0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
                        8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
    const __m512i in = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    return (F)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, (__m512i)to_upper, in);
}
FS_INLINE void store_bits16(uint16_t* p, U v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
}
// 2W halfwords, which fill a line of the cache at once.
typedef __m512i Pair;
FS_INLINE void store_pair(uint16_t* p, Pair v) { _mm512_storeu_si512(p, v); }
FS_INLINE Pair pack_half(F a, F b) {
    const __m256i low = _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i upper = _mm512_cvtps_ph((__m512)b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), upper, 1);
}
FS_INLINE Pair pack_upper(U a, U b) {
    const H upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16((__m512i)a, (__m512i)upper, (__m512i)b);
}
FS_INLINE bool any_nan(F a, F b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0; }
// Within each 128 bits: a 4x4 transposition of rows a, b, c, d.
FS_INLINE void transpose_quads(F& a, F& b, F& c, F& d) {
    const __m512 ab_lo = _mm512_unpacklo_ps((__m512)a, (__m512)b), ab_hi = _mm512_unpackhi_ps((__m512)a, (__m512)b);
    const __m512 cd_lo = _mm512_unpacklo_ps((__m512)c, (__m512)d), cd_hi = _mm512_unpackhi_ps((__m512)c, (__m512)d);
    a = (F)_mm512_shuffle_ps(ab_lo, cd_lo, 0x44);
    b = (F)_mm512_shuffle_ps(ab_lo, cd_lo, 0xEE);
    c = (F)_mm512_shuffle_ps(ab_hi, cd_hi, 0x44);
    d = (F)_mm512_shuffle_ps(ab_hi, cd_hi, 0xEE);
}
// Lane 4g + k holds counter 4k + g, so that after transpose_quads row k is 16 neighbouring normals.
FS_INLINE U lane_counters() { return (U){0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15}; }

#elif FASTSAMPLE_LANES == 8

constexpr int W = 8;
typedef float F __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));

FS_INLINE F splat(float v) { return (F)_mm256_set1_ps(v); }
FS_INLINE U splat(uint32_t v) { return (U)_mm256_set1_epi32((int)v); }
FS_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FS_INLINE F square_root(F a) { return (F)_mm256_sqrt_ps((__m256)a); }
FS_INLINE F to_float(I a) { return (F)_mm256_cvtepi32_ps((__m256i)a); }
FS_INLINE F min_of(F bound, F v) { return (F)_mm256_min_ps((__m256)bound, (__m256)v); }
FS_INLINE F max_of(F bound, F v) { return (F)_mm256_max_ps((__m256)bound, (__m256)v); }
struct Wide {
    __m256i even, odd;
};
FS_INLINE Wide widen(U v) { return Wide{(__m256i)v, _mm256_srli_epi64((__m256i)v, 32)}; }
FS_INLINE U narrow(Wide v) { return (U)_mm256_blend_epi32(v.even, _mm256_slli_epi64(v.odd, 32), 0xAA); }
FS_INLINE Wide multiply(Wide v, uint32_t factor) {
    const __m256i f = _mm256_set1_epi32((int)factor);
    return Wide{_mm256_mul_epu32(v.even, f), _mm256_mul_epu32(v.odd, f)};
}
FS_INLINE Wide high(Wide v) { return Wide{_mm256_srli_epi64(v.even, 32), _mm256_srli_epi64(v.odd, 32)}; }
FS_INLINE Wide xor3(Wide a, Wide b, uint32_t key) {
    const __m256i k = _mm256_set1_epi32((int)key);
    return Wide{_mm256_xor_si256(_mm256_xor_si256(a.even, b.even), k),
                _mm256_xor_si256(_mm256_xor_si256(a.odd, b.odd), k)};
}
FS_INLINE F load(const float* p) { return (F)_mm256_loadu_ps(p); }
FS_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, (__m256)v); }
FS_INLINE F load_half(const uint16_t* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FS_INLINE void store_half(uint16_t* p, F v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FS_INLINE F load_bits16(const uint16_t* p) {
    return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
FS_INLINE void store_bits16(uint16_t* p, U v) {
    const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
typedef __m256i Pair;
FS_INLINE void store_pair(uint16_t* p, Pair v) { _mm256_storeu_si256((__m256i*)p, v); }
FS_INLINE Pair pack_half(F a, F b) {
    const __m128i low = _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i upper = _mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), upper, 1);
}
FS_INLINE Pair pack_upper(U a, U b) {
    const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32((__m256i)a, 16), _mm256_srli_epi32((__m256i)b, 16));
    return _mm256_permute4x64_epi64(packed, 0xD8);
}
FS_INLINE bool any_nan(F a, F b) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
}
FS_INLINE void transpose_quads(F& a, F& b, F& c, F& d) {
    const __m256 ab_lo = _mm256_unpacklo_ps((__m256)a, (__m256)b), ab_hi = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    const __m256 cd_lo = _mm256_unpacklo_ps((__m256)c, (__m256)d), cd_hi = _mm256_unpackhi_ps((__m256)c, (__m256)d);
    a = (F)_mm256_shuffle_ps(ab_lo, cd_lo, 0x44);
    b = (F)_mm256_shuffle_ps(ab_lo, cd_lo, 0xEE);
    c = (F)_mm256_shuffle_ps(ab_hi, cd_hi, 0x44);
    d = (F)_mm256_shuffle_ps(ab_hi, cd_hi, 0xEE);
}
FS_INLINE U lane_counters() { return (U){0, 2, 4, 6, 1, 3, 5, 7}; }

#else

constexpr int W = 1;
typedef float F;
typedef uint32_t U;
typedef int32_t I;

FS_INLINE float splat(float v) { return v; }
FS_INLINE uint32_t splat(uint32_t v) { return v; }
FS_INLINE F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
FS_INLINE F square_root(F a) { return __builtin_sqrtf(a); }
FS_INLINE F to_float(I a) { return (float)a; }
FS_INLINE F min_of(F bound, F v) { return bound < v ? bound : v; }
FS_INLINE F max_of(F bound, F v) { return bound > v ? bound : v; }
typedef uint64_t Wide;
FS_INLINE Wide widen(U v) { return v; }
FS_INLINE U narrow(Wide v) { return (uint32_t)v; }
FS_INLINE Wide multiply(Wide v, uint32_t factor) { return (uint64_t)(uint32_t)v * factor; }
FS_INLINE Wide high(Wide v) { return v >> 32; }
FS_INLINE Wide xor3(Wide a, Wide b, uint32_t key) { return a ^ b ^ key; }
FS_INLINE F load(const float* p) { return *p; }
FS_INLINE void store(float* p, F v) { *p = v; }
FS_INLINE float bits_as_float(uint32_t bits) {
    float v;
    __builtin_memcpy(&v, &bits, 4);
    return v;
}
FS_INLINE uint32_t float_as_bits(float v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    return bits;
}
// A half's exponent and fraction, moved to float's place and scaled by 2^112; subnormals come out exact.
FS_INLINE F load_half(const uint16_t* p) {
    const uint32_t sign = (uint32_t)(*p & 0x8000u) << 16, rest = (uint32_t)(*p & 0x7fffu);
    if (rest >= 0x7c00u) return bits_as_float(sign | 0x7f800000u | (rest & 0x3ffu ? 0x400000u | rest << 13 : 0u));
    return bits_as_float(sign | float_as_bits(bits_as_float(rest << 13) * 5.192296858534828e33f));
}
// Round to nearest even, as the hardware does. Below 2^-14 a half's unit is 2^-24, which is that of 0.5 in float.
FS_INLINE void store_half(uint16_t* p, F v) {
    const uint32_t bits = float_as_bits(v), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    uint32_t half;
    if (size > 0x7f800000u) {
        half = 0x7e00u | (size >> 13 & 0x3ffu);
    } else if (size >= 0x477ff000u) {
        half = 0x7c00u;
    } else if (size < 0x38800000u) {
        half = float_as_bits(bits_as_float(size) + 0.5f) - 0x3f000000u;
    } else {
        half = (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13;
    }
    *p = (uint16_t)(sign | half);
}
FS_INLINE F load_bits16(const uint16_t* p) { return bits_as_float((uint32_t)*p << 16); }
FS_INLINE void store_bits16(uint16_t* p, U v) { *p = (uint16_t)v; }
struct Pair {
    uint16_t low, upper;
};
FS_INLINE void store_pair(uint16_t* p, Pair v) {
    p[0] = v.low;
    p[1] = v.upper;
}
FS_INLINE Pair pack_half(F a, F b) {
    Pair packed;
    store_half(&packed.low, a);
    store_half(&packed.upper, b);
    return packed;
}
FS_INLINE Pair pack_upper(U a, U b) { return Pair{(uint16_t)(a >> 16), (uint16_t)(b >> 16)}; }
FS_INLINE bool any_nan(F a, F b) { return a != a || b != b; }
FS_INLINE void transpose_quads(F&, F&, F&, F&) {}
FS_INLINE U lane_counters() { return 0; }

#endif

#if FASTSAMPLE_LANES > 1
FS_INLINE U as_bits(F v) { return (U)v; }
FS_INLINE F as_float(U v) { return (F)v; }
FS_INLINE F load_part(const float* p, int64_t count) {
    F v = splat(0.0f);
    __builtin_memcpy(&v, p, (size_t)count * 4);
    return v;
}
FS_INLINE void store_part(float* p, F v, int64_t count) { __builtin_memcpy(p, &v, (size_t)count * 4); }
#else
FS_INLINE U as_bits(F v) { return float_as_bits(v); }
FS_INLINE F as_float(U v) { return bits_as_float(v); }
FS_INLINE F load_part(const float*, int64_t) { return 0.0f; }
FS_INLINE void store_part(float*, F, int64_t) {}
#endif

FS_INLINE F divide(F a, float by) { return a / by; }

// In the upper half of each lane: round to nearest even by carrying into it.
FS_INLINE U rounded_upper(F v) {
    const U bits = as_bits(v);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}
// The same, but a NaN stays a (quiet) NaN.
FS_INLINE U rounded_or_nan(F v) {
    const U bits = as_bits(v);
    const auto is_nan = (bits & 0x7fffffffu) > splat(0x7f800000u);
    return is_nan ? (bits | 0x400000u) : rounded_upper(v);
}
FS_INLINE void store_bfloat(uint16_t* p, F v) { store_bits16(p, rounded_or_nan(v) >> 16); }
FS_INLINE Pair pack_bfloat(F a, F b) {
    if (__builtin_expect(any_nan(a, b), false)) return pack_upper(rounded_or_nan(a), rounded_or_nan(b));
    return pack_upper(rounded_upper(a), rounded_upper(b));
}
