// The only place that launches a kernel, and the only one that knows the CUDA runtime's headers. Under
// FASTSAMPLE_CUDA_ON_CPU, in tests, a header of theirs stands in for both: the same sources then run as plain C++.
#pragma once
#include <stdint.h>

#ifdef FASTSAMPLE_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#define FS_INLINE static inline __attribute__((always_inline))
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#define FS_INLINE static __device__ __forceinline__

namespace fastsample {
namespace cuda {

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// A kernel's one argument is a struct, by value: it lies in constant memory.
template <class Args>
void launch(void (*kernel)(Args), dim3 grid, dim3 block, const Args& args, cudaStream_t stream) {
    void* arguments[] = {const_cast<Args*>(&args)};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, 0, stream));
}

}  // namespace cuda
}  // namespace fastsample

#endif
