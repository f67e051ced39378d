// Philox and Box-Muller: what fastsample/ops/noise specifies. Writes 4 bytes a normal, reads nothing.

// Counters j .. j + W - 1 give normals 4j .. 4(j + W) - 1, written in order.
FS_INLINE void normal_group(float* out, uint64_t j, const RoundKeys& keys, uint32_t step, uint32_t stream) {
    const U low = splat((uint32_t)j) + lane_counters();
    const auto carried = low < splat((uint32_t)j);
    const U upper = carried ? splat((uint32_t)(j >> 32) + 1u) : splat((uint32_t)(j >> 32));
    const Words words = philox(Words{low, upper, splat(step), splat(stream)}, keys);
    F n0, n1, n2, n3;
    box_muller(words.w0, words.w1, n0, n1);
    box_muller(words.w2, words.w3, n2, n3);
    transpose_quads(n0, n1, n2, n3);
    store(out, n0);
    store(out + W, n1);
    store(out + 2 * W, n2);
    store(out + 3 * W, n3);
}

// between(i) runs before each group, which starts at out + i.
template <class Between>
FS_INLINE void normals_and(float* out, int64_t first, int64_t count, uint64_t key, uint32_t step, uint32_t stream,
                           Between between) {
    const RoundKeys keys = round_keys(key);
    const uint64_t j = (uint64_t)first / 4;
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W) {
        between(i);
        normal_group(out + i, j + (uint64_t)i / 4, keys, step, stream);
    }
    if (i < count) {
        float rest[4 * W];
        normal_group(rest, j + (uint64_t)i / 4, keys, step, stream);
        memcpy(out + i, rest, (size_t)(count - i) * sizeof(float));
    }
}

static void normals(float* out, int64_t first, int64_t count, uint64_t key, uint32_t step, uint32_t stream) {
    normals_and(out, first, count, key, step, stream, [](int64_t) FS_ALWAYS {});
}

static void philox_words(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
    const Words words = philox(Words{splat(counter[0]), splat(counter[1]), splat(counter[2]), splat(counter[3])},
                               round_keys((uint64_t)key[1] << 32 | key[0]));
    memcpy(out, &words.w0, 4);
    memcpy(out + 1, &words.w1, 4);
    memcpy(out + 2, &words.w2, 4);
    memcpy(out + 3, &words.w3, 4);
}
