// Which elements a thread of an element-wise kernel works on: kCount neighbouring ones of one sample. x runs through a
// sample, y and z through samples; a block takes as many short samples as it has room for. No loop: what a loop keeps
// from round to round would cost the registers that the elements need. Inside namespace fastsample::cuda.

// Half of a multiprocessor's threads can be there: 1024 of 2048 with 64 registers each, 768 of 1536 with 80.
constexpr int kBlockThreads = 128, kWarp = 32;
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
constexpr int kBlocksResident = 6;
#else
constexpr int kBlocksResident = 8;
#endif

struct Shape {
    dim3 grid, block;
};

inline Shape shape_of(int64_t batch, int64_t size, int per_thread) {
    const int64_t threads = (size + per_thread - 1) / per_thread;
    unsigned wide = 1;
    while (wide < kBlockThreads && wide < threads) wide *= 2;
    const unsigned high = kBlockThreads / wide;
    const int64_t rows = (batch + high - 1) / high, deep = (rows + 65534) / 65535;
    return {dim3((unsigned)((threads + wide - 1) / wide), (unsigned)((rows + deep - 1) / deep), (unsigned)deep),
            dim3(wide, high)};
}

// body(sample, first, count): first is the first element, count how many the sample has from there on, up to kCount.
template <int kCount, class Body>
FS_INLINE void each_thread(int64_t batch, int64_t size, Body body) {
    const int64_t first = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * kCount;
    const int64_t sample = ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
    if (first >= size || sample >= batch) return;
    const int64_t left = size - first;
    body(sample, first, left < kCount ? (int)left : kCount);
}

inline bool aligned(const void* p) { return (uintptr_t)p % 16 == 0; }
