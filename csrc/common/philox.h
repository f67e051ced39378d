// Philox4x32-10 (Salmon et al. 2011) on whatever lanes the includer defines. Included inside the includer's namespace, so
// that no two instruction sets ever share a symbol.
// A Wide holds a 32-bit word in the lower half of every 64-bit lane; the upper halves are anything. A 32x32-bit product
// then is a Wide as it stands, whose lower half is the low word: a round moves no words between lanes.

struct Words {
    U w0, w1, w2, w3;
};

// The two words of the key in each of the ten rounds.
struct RoundKeys {
    uint32_t of[10][2];
};

// key: the sample's own, fastsample/ops/noise/keys.py.
FS_INLINE RoundKeys round_keys(uint64_t key) {
    RoundKeys keys;
    for (uint32_t round = 0; round < 10; ++round) {
        keys.of[round][0] = (uint32_t)key + round * 0x9E3779B9u;
        keys.of[round][1] = (uint32_t)(key >> 32) + round * 0xBB67AE85u;
    }
    return keys;
}

// counter: (i/4 low, i/4 high, step, stream).
FS_INLINE Words philox(Words counter, const RoundKeys& keys) {
    Wide c0 = widen(counter.w0), c1 = widen(counter.w1), c2 = widen(counter.w2), c3 = widen(counter.w3);
    for (int round = 0; round < 10; ++round) {
        const Wide product0 = multiply(c0, 0xD2511F53u), product1 = multiply(c2, 0xCD9E8D57u);
        c0 = xor3(high(product1), c1, keys.of[round][0]);
        c2 = xor3(high(product0), c3, keys.of[round][1]);
        c1 = product1;
        c3 = product0;
    }
    return Words{narrow(c0), narrow(c1), narrow(c2), narrow(c3)};
}
