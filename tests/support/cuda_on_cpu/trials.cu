// Small kernels, right and wrong ones, that show what running CUDA on the CPU finds. Each takes floats in and out, through C
// functions that return what was wrong, or an empty string.
#include "cuda_on_cpu.h"

#include <exception>
#include <string>

namespace {

struct Args {
    const float* in;
    float* out;
};

template <bool kWaits>
__global__ void reversed(const Args args) {
    __shared__ float staged[64];
    const unsigned k = threadIdx.x, n = blockDim.x;
    staged[k] = args.in[blockIdx.x * n + k];
    if (kWaits) __syncthreads();
    args.out[blockIdx.x * n + k] = staged[n - 1 - k];
}

// A sum in a fixed order: within warps by shuffles, then over their first lanes.
__global__ void block_sum(const Args args) {
    __shared__ float of_warp[32];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum = args.in[blockIdx.x * blockDim.x + threadIdx.x];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
    if (lane == 0) of_warp[warp] = sum;
    __syncthreads();
    if (warp > 0) return;
    sum = lane < blockDim.x / 32 ? of_warp[lane] : 0.0f;
    for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    if (lane == 0) args.out[blockIdx.x] = sum;
}

__global__ void lanes(const Args args) {
    const unsigned k = threadIdx.x;
    const unsigned positive = __ballot_sync(~0u, args.in[k] > 0.0f);
    const float from_first = __shfl_sync(~0u, args.in[k], 0), from_next = __shfl_down_sync(~0u, args.in[k], 1, 8);
    args.out[k] = from_first + 100.0f * from_next + 10000.0f * static_cast<float>(positive & 255u);
}

__global__ void uninitialised(const Args args) {
    __shared__ float sum;
    if (threadIdx.x == 0) sum += 1.0f;
    __syncthreads();
    args.out[threadIdx.x] = sum;
}

__global__ void returns_early(const Args args) {
    if (args.in[threadIdx.x] < 0.0f) return;
    __syncthreads();
    args.out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(const Args args) {
    if (threadIdx.x % 2) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    args.out[threadIdx.x] = 1.0f;
}

__global__ void half_a_warp(const Args args) {
    if (threadIdx.x < 16) args.out[threadIdx.x] = __shfl_xor_sync(~0u, args.in[threadIdx.x], 1);
}

__global__ void absent_lane(const Args args) {
    if (threadIdx.x < 16) args.out[threadIdx.x] = __shfl_sync(0xffffu, args.in[threadIdx.x], 16);
}

template <int kShift>
__global__ void vectors(const Args args) {
    const float* in = args.in + kShift;
    float* out = args.out + kShift;
    reinterpret_cast<float4*>(out)[threadIdx.x] = reinterpret_cast<const float4*>(in)[threadIdx.x];
}

__global__ void shared_bounds(const Args args) {
    __shared__ float staged[8];
    float* to = staged;
    to[threadIdx.x] = args.in[threadIdx.x];
    __syncthreads();
    args.out[threadIdx.x] = staged[7];
}

__global__ void block_numbers(const Args args) {
    args.out[blockIdx.x + static_cast<size_t>(gridDim.x) * (blockIdx.y + static_cast<size_t>(gridDim.y) * blockIdx.z)] += 1.0f;
}

struct Trial {
    const char* name;
    void (*kernel)(Args);
};
const Trial kTrials[] = {
    {"reversed", reversed<true>},       {"reversed without barrier", reversed<false>},
    {"block_sum", block_sum},           {"lanes", lanes},
    {"uninitialised", uninitialised},   {"returns_early", returns_early},
    {"two_barriers", two_barriers},     {"half_a_warp", half_a_warp},
    {"absent_lane", absent_lane},       {"vectors", vectors<0>},
    {"vectors shifted", vectors<1>},
    {"shared_bounds", shared_bounds},   {"block_numbers", block_numbers},
};

std::string why;

}  // namespace

// grid and block hold three numbers each.
extern "C" __attribute__((visibility("default"))) const char* run_trial(const char* name, const unsigned* grid,
                                                                        const unsigned* block, const float* in,
                                                                        float* out) {
    why = std::string("there is no trial ") + name;
    for (const Trial& trial : kTrials) {
        if (strcmp(trial.name, name) != 0) continue;
        why.clear();
        try {
            fastsample::cuda::launch(trial.kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                                    Args{in, out}, nullptr);
        } catch (const std::exception& error) {
            why = error.what();
        }
    }
    return why.c_str();
}
