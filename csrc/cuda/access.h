// Elements in memory as floats in registers: kCount neighbouring ones of a thread, all there and aligned to 128 bits
// where kCount is kWhole, else guarded one by one. Inside namespace fastsample::cuda, after lanes.h.

// Two Philox calls, and one 128-bit access of a 16-bit dtype.
constexpr int kWhole = 8;
// One Philox call.
constexpr int kPart = 4;

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};

FS_INLINE F to_float(float v) { return v; }
FS_INLINE F to_float(Half v) { return half_to_float(v.bits); }
FS_INLINE F to_float(Bfloat v) { return bfloat_to_float(v.bits); }
FS_INLINE F low_to_float(U pair, Half) { return half_to_float(pair & 0xffffu); }
FS_INLINE F high_to_float(U pair, Half) { return half_to_float(pair >> 16); }
FS_INLINE F low_to_float(U pair, Bfloat) { return bfloat_to_float(pair); }
FS_INLINE F high_to_float(U pair, Bfloat) { return as_float(pair & 0xffff0000u); }
FS_INLINE U to_pair(F low, F high, Half) { return to_halves(low, high); }
FS_INLINE U to_pair(F low, F high, Bfloat) { return to_bfloats(low, high); }

FS_INLINE void load_whole(const float* p, F* v) {
    const float4 low = *(const float4*)p, high = *(const float4*)(p + 4);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}
template <class T>
FS_INLINE void load_whole(const T* p, F* v) {
    const uint4 pairs = *(const uint4*)p;
    const U words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = low_to_float(words[i], T());
        v[2 * i + 1] = high_to_float(words[i], T());
    }
}

FS_INLINE void store_whole(float* p, const F* v) {
    *(float4*)p = make_float4(v[0], v[1], v[2], v[3]);
    *(float4*)(p + 4) = make_float4(v[4], v[5], v[6], v[7]);
}
template <class T>
FS_INLINE void store_whole(T* p, const F* v) {
    *(uint4*)p = make_uint4(to_pair(v[0], v[1], T()), to_pair(v[2], v[3], T()), to_pair(v[4], v[5], T()),
                            to_pair(v[6], v[7], T()));
}

FS_INLINE void store_one(float* p, F v) { *p = v; }
template <class T>
FS_INLINE void store_one(T* p, F v) {
    p->bits = (uint16_t)to_pair(v, 0.0f, T());
}

// `count` of them are there; what is not, is 0.
template <int kCount, class T>
FS_INLINE void load(const T* p, int count, F* v) {
    if (kCount == kWhole) {
        load_whole(p, v);
    } else {
        for (int i = 0; i < kCount; ++i) v[i] = i < count ? to_float(p[i]) : 0.0f;
    }
}

template <int kCount, class T>
FS_INLINE void store(T* p, int count, const F* v) {
    if (kCount == kWhole) {
        store_whole(p, v);
    } else {
        for (int i = 0; i < kCount; ++i)
            if (i < count) store_one(p + i, v[i]);
    }
}

template <int kCount>
FS_INLINE void store_scaled(void* p, int dtype, int64_t at, int count, F scale, const F* v) {
    F scaled[kCount];
    for (int i = 0; i < kCount; ++i) scaled[i] = v[i] * scale;
    if (dtype == kFloat16) store<kCount>((Half*)p + at, count, scaled);
    else if (dtype == kBFloat16) store<kCount>((Bfloat*)p + at, count, scaled);
    else store<kCount>((float*)p + at, count, scaled);
}
