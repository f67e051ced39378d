// Noise drawn in registers. Inside namespace fastsample::cuda, after normal.h.

// Normals number first .. first + kCount - 1 of a sample's stream; first is a multiple of 4.
template <int kCount>
FS_INLINE void draw(F* z, int64_t first, uint64_t key, uint32_t step, uint32_t stream) {
    const RoundKeys keys = round_keys(key);
    for (int i = 0; i < kCount / 4; ++i) {
        const uint64_t j = (uint64_t)first / 4 + i;
        const Words words = philox(Words{(uint32_t)j, (uint32_t)(j >> 32), step, stream}, keys);
        box_muller(words.w0, words.w1, z[4 * i], z[4 * i + 1]);
        box_muller(words.w2, words.w3, z[4 * i + 2], z[4 * i + 3]);
    }
}
