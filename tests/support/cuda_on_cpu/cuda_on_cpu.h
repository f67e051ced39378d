// CUDA C++ as plain C++, on one CPU thread: what csrc/cuda uses of the language and of the runtime, so that tests run the
// kernels' own source under sanitizers. A block's threads run one after the other, each until it returns or waits; only
// those that wait cost a stack. Blocks follow one another, so shared memory is static.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// With their real alignment: what the hardware cannot load in one piece, UBSan reports.
#define CUDA_ON_CPU_VECTORS(scalar, name, size)                                                                          \
    struct alignas(2 * size) name##2 {                                                                                   \
        scalar x, y;                                                                                                     \
    };                                                                                                                   \
    struct alignas(4 * size) name##4 {                                                                                   \
        scalar x, y, z, w;                                                                                               \
    };                                                                                                                   \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                                                 \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(float, float, 4)
CUDA_ON_CPU_VECTORS(int, int, 4)
CUDA_ON_CPU_VECTORS(unsigned, uint, 4)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 2)
#undef CUDA_ON_CPU_VECTORS

namespace cuda_on_cpu {

// Where a thread waits. Threads meet where the line is the same, and for warps the mask.
struct Site {
    const char* file;
    int line;
    unsigned mask;  // 0: the whole block
};
void wait(Site site);
// The lanes' values of this exchange: every lane of the mask has left its own when it returns.
const uint64_t* exchange(uint64_t value, Site site);
[[noreturn]] void fail(Site site, const char* why);
void run(const void* kernel, dim3 grid, dim3 block, void (*thread)(const void*), const void* context);

template <class T>
T from_lane(T value, int lane, Site site) {
    static_assert(sizeof(T) <= 8, "a lane exchanges at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    const uint64_t* lanes = exchange(bits, site);
    if (!(site.mask >> lane & 1u)) fail(site, "reads from a lane that is not in the mask");
    memcpy(&value, lanes + lane, sizeof(T));
    return value;
}

// Sixteen-bit floats by the compiler's own arithmetic, which is not the project's.
inline float half_to_float(uint32_t bits) {
    const uint16_t low = static_cast<uint16_t>(bits);
    _Float16 v;
    memcpy(&v, &low, 2);
    return static_cast<float>(v);
}
inline uint32_t float_to_half(float v) {
    const _Float16 half = static_cast<_Float16>(v);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
inline uint32_t float_to_bfloat(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const uint32_t upper = bits >> 16, rest = bits & 0xffffu;
    if (v != v) return upper | 0x40u;
    return upper + (rest > 0x8000u || (rest == 0x8000u && upper % 2));
}

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize; }

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(CUDA_ON_CPU_HERE) { cuda_on_cpu::wait({file, line, 0}); }
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_HERE) { cuda_on_cpu::exchange(0, {file, line, mask}); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CUDA_ON_CPU_HERE) {
    const int first = cuda_on_cpu::lane() / width * width;
    return cuda_on_cpu::from_lane(value, first + (source & (width - 1)), {file, line, mask});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_HERE) {
    const int lane = cuda_on_cpu::lane(), source = lane + static_cast<int>(delta);
    return cuda_on_cpu::from_lane(value, source / width == lane / width ? source : lane, {file, line, mask});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_HERE) {
    const int lane = cuda_on_cpu::lane(), source = lane - static_cast<int>(delta);
    return cuda_on_cpu::from_lane(value, source >= lane / width * width ? source : lane, {file, line, mask});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, CUDA_ON_CPU_HERE) {
    const int lane = cuda_on_cpu::lane(), source = lane ^ bits;
    return cuda_on_cpu::from_lane(value, source / width <= lane / width ? source : lane, {file, line, mask});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
    const uint64_t* lanes = cuda_on_cpu::exchange(predicate != 0, {file, line, mask});
    unsigned found = 0;
    for (int lane = 0; lane < warpSize; ++lane)
        if (mask >> lane & 1u) found |= static_cast<unsigned>(lanes[lane]) << lane;
    return found;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
    return __ballot_sync(mask, predicate, file, line) == mask;
}
#undef CUDA_ON_CPU_HERE
inline void __threadfence() {}
inline void __threadfence_block() {}

// One thread runs at a time, so a plain read and write is atomic.
template <class T, class F>
T cuda_on_cpu_update(T* at, F next) {
    const T before = *at;
    *at = next(before);
    return before;
}
template <class T>
T atomicAdd(T* at, std::common_type_t<T> v) {
    return cuda_on_cpu_update(at, [=](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicMin(T* at, std::common_type_t<T> v) {
    return cuda_on_cpu_update(at, [=](T old) { return v < old ? v : old; });
}
template <class T>
T atomicMax(T* at, std::common_type_t<T> v) {
    return cuda_on_cpu_update(at, [=](T old) { return v > old ? v : old; });
}
template <class T>
T atomicOr(T* at, std::common_type_t<T> v) {
    return cuda_on_cpu_update(at, [=](T old) { return old | v; });
}
template <class T>
T atomicExch(T* at, std::common_type_t<T> v) {
    return cuda_on_cpu_update(at, [=](T) { return v; });
}

typedef struct CudaOnCpuStream* cudaStream_t;

namespace fastsample {
namespace cuda {

// A launch as csrc/cuda does it: one struct of arguments, copied for the kernel.
template <class Args>
void launch(void (*kernel)(Args), dim3 grid, dim3 block, const Args& args, cudaStream_t) {
    struct Call {
        void (*kernel)(Args);
        const Args args;
    } const call{kernel, args};
    static_assert(sizeof(Args) <= 4096, "a launch passes at most 4 KiB");
    const auto thread = [](const void* context) {
        const Call& call = *static_cast<const Call*>(context);
        call.kernel(call.args);
    };
    cuda_on_cpu::run(reinterpret_cast<const void*>(kernel), grid, block, thread, &call);
}

}  // namespace cuda
}  // namespace fastsample
