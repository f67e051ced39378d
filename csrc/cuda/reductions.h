// What rescale.cu and threshold.cu share. A block takes one chunk of one sample: x of the grid runs through chunks, y
// and z through samples. Inside namespace fastsample::cuda.

constexpr int kReduceThreads = 256, kReduceBlocks = 4;

inline Shape chunk_shape(int64_t batch, int64_t size) {
    const int64_t deep = (batch + 65534) / 65535;
    return {dim3((unsigned)((size + kChunk - 1) / kChunk), (unsigned)((batch + deep - 1) / deep), (unsigned)deep),
            dim3(kReduceThreads)};
}

FS_INLINE int64_t sample_of_block() { return (int64_t)blockIdx.z * gridDim.y + blockIdx.y; }

// body(first, count) for 8 neighbouring elements of the sample at a time. Which thread takes them does not depend on
// whether they can be accessed at once.
template <class Body>
FS_INLINE void each_eight(int64_t size, Body body) {
    const int64_t begin = (int64_t)blockIdx.x * kChunk, end = begin + kChunk < size ? begin + kChunk : size;
    for (int64_t first = begin + (int64_t)threadIdx.x * kWhole; first < end; first += kReduceThreads * kWhole) {
        const int64_t left = end - first;
        body(first, left < kWhole ? (int)left : kWhole);
    }
}

template <bool kAligned, class T>
FS_INLINE void load_eight(const T* p, int count, F* v) {
    if (kAligned) {
        load_whole(p, v);
    } else {
        for (int i = 0; i < kWhole; ++i) v[i] = i < count ? to_float(p[i]) : 0.0f;
    }
}

template <bool kAligned>
FS_INLINE void store_eight(float* p, int count, const F* v) {
    if (kAligned) {
        store_whole(p, v);
    } else {
        for (int i = 0; i < kWhole; ++i)
            if (i < count) p[i] = v[i];
    }
}

// The model's output after guidance, and before in `conditional`.
template <class T, bool kAligned>
FS_INLINE void load_output_eight(const DeviceStepArgs& args, int64_t sample, int64_t first, int count, F* m,
                                 F* conditional) {
    const int64_t at = sample * args.m_stride + first;
    load_eight<kAligned>((const T*)args.m + at, count, conditional);
    if (args.uncond) {
        load_eight<kAligned>((const T*)args.uncond + at, count, m);
        const float guidance = args.guidance[sample];
        for (int i = 0; i < kWhole; ++i) m[i] = guide(guidance, conditional[i], m[i]);
    } else {
        for (int i = 0; i < kWhole; ++i) m[i] = conditional[i];
    }
}
