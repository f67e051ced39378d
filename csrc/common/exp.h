// exp(x) to 1.1 ulp, explicit fma only, like normal.h. On the includer's lanes, inside its namespace.
// x = n ln 2 + r with |r| <= ln 2 / 2 and a minimax polynomial for e^r, relative error 2^-28; 2^n in two factors, so that
// results grow to infinity and fade through the subnormals to 0 as they should. A NaN stays a NaN.
FS_INLINE F exp_of(F x) {
    const F bounded = min_of(splat(130.0f), max_of(splat(-150.0f), x));
    const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
    const F shifted = fma(bounded, splat(1.44269504088896341f), magic);
    const F n = shifted - magic;
    F r = fma(n, splat(-0.693145751953125f), bounded);
    r = fma(n, splat(-1.42860682030941723e-6f), r);
    F poly = splat(0.00138145399889f);
    poly = fma(poly, r, splat(0.00836874511635f));
    poly = fma(poly, r, splat(0.0416683907874f));
    poly = fma(poly, r, splat(0.16666520399f));
    poly = fma(poly, r, splat(0.499999934321f));
    poly = fma(poly, r, splat(1.0f));
    poly = fma(poly, r, splat(1.0f));
    const I whole = (I)(as_bits(shifted) - as_bits(magic));
    const I half = whole >> 1;
    const F one_part = as_float((U)(half + 127) << 23), other_part = as_float((U)(whole - half + 127) << 23);
    return poly * one_part * other_part;
}
