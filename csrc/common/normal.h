// The one transform from Philox words to standard normals. Explicit fma, exactly rounded sqrt, no libm: every
// instruction set and every GPU gives the same bits. Against the exact Box-Muller formula the error is below 3 ulp:
// log 1.2, halved by the square root's derivative, sqrt 0.5, sine or cosine 1, product 0.5.
// On the includer's lanes, inside its namespace, like philox.h.

// -2 ln(u) for u in [2^-25, 1]: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and a minimax polynomial for
// (2f - 2 ln(1 + f)) / f^2, relative error 2^-27.9.
FS_INLINE F minus_two_log(F u) {
    // 2^23 e, whose power of two the constants take back exactly.
    const U exponent = (as_bits(u) - 0x3f3504f3u) & 0xff800000u;
    const F e = to_float((I)exponent);
    const F f = as_float(as_bits(u) - exponent) - 1.0f;
    F poly = splat(0.152434260945f);
    poly = fma(poly, f, splat(-0.258087663633f));
    poly = fma(poly, f, splat(0.26485977313f));
    poly = fma(poly, f, splat(-0.283636664739f));
    poly = fma(poly, f, splat(0.332181672404f));
    poly = fma(poly, f, splat(-0.400039470903f));
    poly = fma(poly, f, splat(0.500031657938f));
    poly = fma(poly, f, splat(-0.666666513948f));
    poly = fma(poly, f, splat(0.999999766945f));
    // -2 ln 2 in two parts.
    const F low = fma(f * f, poly, e * (3.80930859991551e-9f / 8388608.0f));
    return fma(e, splat(-1.3862943649291992f / 8388608.0f), fma(splat(-2.0f), f, low));
}

// (cos, sin) of 2 pi k / 2^24 where k is the upper 24 bits of y. The quadrant is y's upper two bits after rounding; the
// rest w in [-1/2, 1/2] of a quadrant is what lies below them, as a signed number, exact in float32. Relative error of
// the polynomials 2^-28.2 (sine) and 2^-33.9 (cosine).
FS_INLINE void cos_sin_turn(U y, F& cosine, F& sine) {
    const F w = to_float((I)((y << 2) & 0xfffffc00u)) * 2.3283064365386963e-10f;
    const F t = w * w;
    F sin_rest = splat(-0.0046016258610298f);
    sin_rest = fma(sin_rest, t, splat(0.079680022655315f));
    sin_rest = fma(sin_rest, t, splat(-0.64596345946306f));
    // pi/2 in two parts; the small one is the fit's, which trades 5e-9 of it for the degree it lacks.
    const F s = fma(w, splat(1.57079637050628662f), w * fma(sin_rest, t, splat(-4.8806183e-8f)));
    F cos_rest = splat(0.00090376031407232f);
    cos_rest = fma(cos_rest, t, splat(-0.020860162434832f));
    cos_rest = fma(cos_rest, t, splat(0.25366922562316f));
    cos_rest = fma(cos_rest, t, splat(-1.2337005425854f));
    const F c = fma(cos_rest, t, splat(1.0f));
    const U quadrant = y + 0x20000000u;
    const auto odd = (quadrant & 0x40000000u) != 0u;
    const U cos_bits = as_bits(odd ? s : c) ^ ((quadrant + 0x40000000u) & 0x80000000u);
    const U sin_bits = as_bits(odd ? c : s) ^ (quadrant & 0x80000000u);
    cosine = as_float(cos_bits);
    sine = as_float(sin_bits);
}

// Box-Muller: radius from the upper 24 bits of x, u1 = (x >> 8) 2^-24 + 2^-25 in (0, 1]; angle from those of y.
FS_INLINE void box_muller(U x, U y, F& first, F& second) {
    const F u1 = fma(to_float((I)(x >> 8)), splat(5.9604644775390625e-8f), splat(2.98023223876953125e-8f));
    const F radius = square_root(minus_two_log(u1));
    F cosine, sine;
    cos_sin_turn(y, cosine, sine);
    first = radius * cosine;
    second = radius * sine;
}
