// 2^x for x in [-126, 127], beyond which it stays at the ends' values; explicit fma only, like normal.h. On the includer's
// lanes, inside its namespace. x = n + r with |r| <= 1/2 and a minimax polynomial for 2^r, relative error 2^-28.3; with the
// roundings below 1.5 ulp. A NaN stays a NaN.
FS_INLINE F bounded_exponent(F x) { return min_of(splat(127.0f), max_of(splat(-126.0f), x)); }

FS_INLINE F exp2_of(F x) {
    const F bounded = bounded_exponent(x);
    // 1.5 * 2^23 + 127: adding it rounds to an integer n, and leaves n + 127, the exponent's code of 2^n, in the low bits.
    const F magic = splat(12583039.0f);
    const F shifted = bounded + magic;
    const F r = bounded - (shifted - magic);
    F poly = splat(0.00015326483117f);
    poly = fma(poly, r, splat(0.00133908097632f));
    poly = fma(poly, r, splat(0.00961850583553f));
    poly = fma(poly, r, splat(0.0555035993457f));
    poly = fma(poly, r, splat(0.240226477385f));
    poly = fma(poly, r, splat(0.693147182465f));
    poly = fma(poly, r, splat(1.0f));
    return poly * as_float(as_bits(shifted) << 23);
}
