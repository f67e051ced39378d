// The lanes of a CUDA thread: one float, as the scalar level's of ../cpu/lanes.h, and with the same bits. Included
// inside namespace fastsample::cuda, after launch.h. Compiled with -fmad=false, so only fma() contracts.

typedef float F;
typedef uint32_t U;
typedef int32_t I;

FS_INLINE float splat(float v) { return v; }
FS_INLINE uint32_t splat(uint32_t v) { return v; }
FS_INLINE F to_float(I a) { return (float)a; }

// A 32x32-bit product is one IMAD.WIDE, whose halves are two registers: neither widening nor taking the high word costs
// an instruction, and the key joins the other two words in one LOP3.
typedef uint64_t Wide;
FS_INLINE Wide widen(U v) { return v; }
FS_INLINE U narrow(Wide v) { return (uint32_t)v; }
FS_INLINE Wide multiply(Wide v, uint32_t factor) { return (uint64_t)(uint32_t)v * factor; }
FS_INLINE Wide high(Wide v) { return v >> 32; }
FS_INLINE Wide xor3(Wide a, Wide b, uint32_t key) { return (uint32_t)a ^ (uint32_t)b ^ key; }

#ifdef FASTSAMPLE_CUDA_ON_CPU

FS_INLINE F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
FS_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
FS_INLINE F reciprocal_root(F a) { return 1.0f / __builtin_sqrtf(a); }
FS_INLINE F reciprocal(F a) { return 1.0f / a; }
FS_INLINE F larger(F a, F b) { return a < b ? b : a; }
FS_INLINE F min_of(F bound, F v) { return bound < v ? bound : v; }
FS_INLINE F max_of(F bound, F v) { return bound > v ? bound : v; }
FS_INLINE F as_float(U bits) {
    float v;
    __builtin_memcpy(&v, &bits, 4);
    return v;
}
FS_INLINE U as_bits(F v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    return bits;
}
FS_INLINE F half_to_float(U bits) { return cuda_on_cpu::half_to_float(bits); }
FS_INLINE U to_halves(F low, F high) {
    return cuda_on_cpu::float_to_half(low) | cuda_on_cpu::float_to_half(high) << 16;
}
FS_INLINE U to_bfloats(F low, F high) {
    return cuda_on_cpu::float_to_bfloat(low) | cuda_on_cpu::float_to_bfloat(high) << 16;
}

#else

FS_INLINE F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
FS_INLINE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
FS_INLINE F as_float(U bits) { return __uint_as_float(bits); }
FS_INLINE U as_bits(F v) { return __float_as_uint(v); }

// Both within 2^-22.9 of the exact value, on every architecture.
FS_INLINE F reciprocal_root(F a) {
    float v;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(a));
    return v;
}
FS_INLINE F reciprocal(F a) {
    float v;
    asm("rcp.approx.f32 %0, %1;" : "=f"(v) : "f"(a));
    return v;
}
FS_INLINE F larger(F a, F b) { return fmaxf(a, b); }

// The second operand where one is NaN; from sm_80 on one instruction, which gives NaN where either is: bounds are
// numbers.
FS_INLINE F min_of(F bound, F v) {
#if __CUDA_ARCH__ >= 800
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(bound), "f"(v));
    return least;
#else
    return bound < v ? bound : v;
#endif
}
FS_INLINE F max_of(F bound, F v) {
#if __CUDA_ARCH__ >= 800
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(bound), "f"(v));
    return most;
#else
    return bound > v ? bound : v;
#endif
}

FS_INLINE F half_to_float(U bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"((uint16_t)bits));
    return v;
}
FS_INLINE U to_halves(F low, F high) {
    U pair;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("{.reg .b16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; mov.b32 %0, {low, high};}"
        : "=r"(pair)
        : "f"(low), "f"(high));
#endif
    return pair;
}
FS_INLINE U to_bfloats(F low, F high) {
    U pair;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    // Round to nearest even by carrying into the upper half; a NaN stays a (quiet) NaN.
    const U bits[2] = {as_bits(low), as_bits(high)};
    U rounded[2];
    for (int i = 0; i < 2; ++i) {
        rounded[i] = (bits[i] + 0x7fffu + (bits[i] >> 16 & 1u)) >> 16;
        if ((bits[i] & 0x7fffffffu) > 0x7f800000u) rounded[i] = bits[i] >> 16 | 0x40u;
    }
    pair = rounded[0] | rounded[1] << 16;
#endif
    return pair;
}

#endif

FS_INLINE F bfloat_to_float(U bits) { return as_float(bits << 16); }

// A radius from its square, which is 0 or from 2^-22 to 35: correctly rounded, as sqrt.rn is but without its branch.
// One step of Newton's method: from any reciprocal root within the bound above the last fma rounds right for every
// square that minus_two_log gives (tests/gpu/test_cuda_arithmetic.py goes through all 2^24 of them).
FS_INLINE F refine_root(F a, F reciprocal) {
    const F root = a * reciprocal;
    return fma(fma(-root, root, a), 0.5f * reciprocal, root);
}
FS_INLINE F square_root(F a) { return refine_root(a, reciprocal_root(larger(a, 7.8886090522101181e-31f))); }

// Correctly rounded, as div.rn is but without its branch, for |a| <= by and a normal `by`: a quotient of two floats
// lies at least 2^-49 of itself away from where rounding changes, or is exact in double. The reciprocal is one for all
// elements of a thread.
FS_INLINE F refine_quotient(F a, float by, F reciprocal) {
    const double divisor = by, first = reciprocal, second = fma(first, fma(-divisor, first, 1.0), first);
    const double inverse = fma(second, fma(-divisor, second, 1.0), second), quotient = a * inverse;
    return (F)fma(-inverse, fma(quotient, divisor, -(double)a), quotient);  // in this order -0 stays -0
}
FS_INLINE F divide(F a, float by) { return refine_quotient(a, by, reciprocal(by)); }
