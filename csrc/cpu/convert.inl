// The dtypes of a model's output and input: vectors of their elements as floats, and back. A last partial vector of 16-bit
// floats goes through a padded buffer.

struct Float {
    FS_INLINE F load(const void* from, int64_t i, int64_t count) {
        return FASTSAMPLE_ISA::load((const float*)from + i, count);
    }
    FS_INLINE void store(void* to, int64_t i, F v, int64_t count) {
        FASTSAMPLE_ISA::store((float*)to + i, v, count);
    }
};

template <F (*Load)(const uint16_t*), void (*Store)(uint16_t*, F), Pair (*Pack)(F, F)>
struct SixteenBits {
    FS_INLINE F load(const void* from, int64_t i, int64_t count) {
        const uint16_t* const at = (const uint16_t*)from + i;
        if (W == 1 || count == W) return Load(at);
        uint16_t part[W] = {0};
        return Load((const uint16_t*)memcpy(part, at, (size_t)count * 2));
    }
    FS_INLINE void store(void* to, int64_t i, F v, int64_t count) {
        uint16_t* const at = (uint16_t*)to + i;
        if (W == 1 || count == W) return Store(at, v);
        uint16_t part[W];
        Store(part, v);
        memcpy(at, part, (size_t)count * 2);
    }
    FS_INLINE Pair pack(F a, F b) { return Pack(a, b); }
};
typedef SixteenBits<load_half, store_half, pack_half> Half;
typedef SixteenBits<load_bits16, store_bfloat, pack_bfloat> Bfloat;

// Calls body with an object of the dtype's type.
template <class Body>
FS_INLINE void with_dtype(int dtype, Body body) {
    switch (dtype) {
        case kFloat32: body(Float{}); break;
        case kFloat16: body(Half{}); break;
        default: body(Bfloat{}); break;
    }
}

FS_INLINE const void* element(const void* in, int dtype, int64_t at) {
    return (const char*)in + at * (dtype == kFloat32 ? 4 : 2);
}
FS_INLINE void* element(void* in, int dtype, int64_t at) { return (char*)in + at * (dtype == kFloat32 ? 4 : 2); }

// n elements as floats: where they are if they are floats already, else in `block`.
FS_INLINE const float* as_floats(const void* in, int dtype, float* block, int64_t n) {
    if (dtype == kFloat32) return (const float*)in;
    with_dtype(dtype, [=](auto type) FS_ALWAYS {
        each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS { store(block + i, type.load(in, i, count), count); });
    });
    return block;
}

static void write_scaled(void* out, int dtype, const float* in, float scale, int64_t n) {
    with_dtype(dtype, [=](auto type) FS_ALWAYS {
        each_vector(n, [=](int64_t i, int64_t count) FS_ALWAYS {
            type.store(out, i, load(in + i, count) * scale, count);
        });
    });
}
