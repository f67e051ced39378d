// Philox4x32-10 (Salmon et al. 2011), on whatever lanes the includer defines: F, U, mul_hi_lo, xor3.
// Included inside the includer's namespace, so that no two instruction sets ever share a symbol.

struct Words {
    U w0, w1, w2, w3;
};

// key: the sample's 64-bit seed as (low, high). counter: (i/4 low, i/4 high, step, stream).
FS_INLINE Words philox(Words c, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        U hi0, lo0, hi1, lo1;
        mul_hi_lo(c.w0, 0xD2511F53u, hi0, lo0);
        mul_hi_lo(c.w2, 0xCD9E8D57u, hi1, lo1);
        c = Words{xor3(hi1, c.w1, splat(key0)), lo1, xor3(hi0, c.w3, splat(key1)), lo0};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}
