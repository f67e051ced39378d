// Sixteen-bit floats to float and back, a last partial vector through a padded buffer.

template <F (*Load)(const uint16_t*)>
static void from_16_bits(float* out, const uint16_t* in, int64_t n) {
    each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS {
        uint16_t part[W] = {0};
        const uint16_t* from = in + i;
        if (count != W) from = (const uint16_t*)memcpy(part, from, (size_t)count * 2);
        store(out + i, Load(from), count);
    });
}

template <void (*Store)(uint16_t*, F)>
static void to_16_bits(uint16_t* out, const float* in, float scale, int64_t n) {
    each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS {
        const F v = load(in + i, count) * scale;
        if (count == W) {
            Store(out + i, v);
        } else {
            uint16_t part[W];
            Store(part, v);
            memcpy(out + i, part, (size_t)count * 2);
        }
    });
}

// Elements [at, at + n) of `in` as floats: in place where they are floats already, else in `block`.
FS_INLINE const float* as_floats(const void* in, int dtype, int64_t at, float* block, int64_t n) {
    if (dtype == kFloat32) return (const float*)in + at;
    dtype == kFloat16 ? from_16_bits<load_half>(block, (const uint16_t*)in + at, n)
                      : from_16_bits<load_bits16>(block, (const uint16_t*)in + at, n);
    return block;
}

static void write_scaled(void* out, int dtype, int64_t at, const float* in, float scale, int64_t n) {
    if (dtype == kFloat16) {
        to_16_bits<store_half>((uint16_t*)out + at, in, scale, n);
    } else if (dtype == kBFloat16) {
        to_16_bits<store_bfloat>((uint16_t*)out + at, in, scale, n);
    } else {
        float* to = (float*)out + at;
        each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS { store(to + i, load(in + i, count) * scale, count); });
    }
}
