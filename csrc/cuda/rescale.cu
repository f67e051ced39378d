// The factor of guidance rescale, what fastsample/ops/step/reductions.py specifies: reads both halves of m once. Moments are doubles
// about the first value, exactly 0 for a constant; fixed chunks, combined in a fixed order, make them those of any
// batch and any device. Eight double operations an element: GPUs that do them at 1/64 of the float rate are bound by
// them, not by memory.
#include "common.h"

namespace fastsample {
namespace cuda {
namespace {

#include "reductions.h"

struct RescaleArgs : DeviceStepArgs {
    double* moments;
    float* to;
    float phi;
};

struct Moments {
    double of_m[2], of_conditional[2];  // sum and sum of squares
};

FS_INLINE void accumulate(double* moments, float v, float origin) {
    const double centred = (double)v - (double)origin;
    moments[0] += centred;
    moments[1] = fma(centred, centred, moments[1]);
}

FS_INLINE double over_warp(double v) {
    for (int distance = kWarp / 2; distance; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    return v;
}

// The block's sum, complete in thread 0.
FS_INLINE void over_block(Moments* moments) {
    __shared__ double partial[4][kReduceThreads / kWarp];
    double* const values[4] = {&moments->of_m[0], &moments->of_m[1], &moments->of_conditional[0],
                               &moments->of_conditional[1]};
    for (int k = 0; k < 4; ++k) {
        *values[k] = over_warp(*values[k]);
        if (threadIdx.x % kWarp == 0) partial[k][threadIdx.x / kWarp] = *values[k];
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int k = 0; k < 4; ++k)
        for (int warp = 1; warp < kReduceThreads / kWarp; ++warp) *values[k] += partial[k][warp];
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kReduceThreads, kReduceBlocks) moments_kernel(const RescaleArgs args) {
    const int64_t sample = sample_of_block();
    if (sample >= args.batch) return;
    const T* const m = (const T*)args.m + sample * args.m_stride;
    const T* const uncond = (const T*)args.uncond + sample * args.m_stride;
    const float first_m = to_float(m[0]), origin = guide(args.guidance[sample], first_m, to_float(uncond[0]));
    Moments moments = {};
    each_eight(args.size, [&](int64_t first, int count) {
        F combined[kWhole], conditional[kWhole];
        load_output_eight<T, kAligned>(args, sample, first, count, combined, conditional);
        for (int i = 0; i < kWhole; ++i) {
            if (i < count) {
                accumulate(moments.of_m, combined[i], origin);
                accumulate(moments.of_conditional, conditional[i], first_m);
            }
        }
    });
    over_block(&moments);
    if (threadIdx.x == 0) ((Moments*)args.moments)[sample * gridDim.x + blockIdx.x] = moments;
}

FS_INLINE double deviations(const double* moments, int64_t n) {
    const double left = moments[1] - moments[0] * moments[0] / (double)n;
    return left < 0 ? 0 : left;  // NaN stays NaN
}

// One block a sample.
__global__ void __launch_bounds__(kReduceThreads, kReduceBlocks) factors_kernel(const RescaleArgs args) {
    const int64_t sample = blockIdx.x, chunks = (args.size + kChunk - 1) / kChunk;
    Moments moments = {};
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kReduceThreads) {
        const Moments& one = ((const Moments*)args.moments)[sample * chunks + chunk];
        for (int k = 0; k < 2; ++k) {
            moments.of_m[k] += one.of_m[k];
            moments.of_conditional[k] += one.of_conditional[k];
        }
    }
    over_block(&moments);
    if (threadIdx.x != 0) return;
    const double of_m = deviations(moments.of_m, args.size);
    const double of_conditional = deviations(moments.of_conditional, args.size);
    const double phi = args.phi;
    args.to[sample] = of_m == 0 ? 1.0f : (float)(phi * sqrt(of_conditional / of_m) + (1.0 - phi));
}

template <class T>
void launch_moments(const RescaleArgs& args, cudaStream_t stream) {
    const bool good = args.size % kWhole == 0 && args.m_stride % kWhole == 0 && aligned(args.m) && aligned(args.uncond);
    const Shape shape = chunk_shape(args.batch, args.size);
    launch(good ? moments_kernel<T, true> : moments_kernel<T, false>, shape.grid, shape.block, args, stream);
}

}  // namespace

void rescale_factors(const DeviceStepArgs& step, float phi, double* moments, float* factors, Stream to) {
    RescaleArgs args = {};
    static_cast<DeviceStepArgs&>(args) = step;
    args.phi = phi;
    args.moments = moments;
    args.to = factors;
    const cudaStream_t stream = static_cast<cudaStream_t>(to);
    if (args.m_dtype == kFloat16) launch_moments<Half>(args, stream);
    else if (args.m_dtype == kBFloat16) launch_moments<Bfloat>(args, stream);
    else launch_moments<float>(args, stream);
    launch(factors_kernel, dim3((unsigned)args.batch), dim3(kReduceThreads), args, stream);
}

}  // namespace cuda
}  // namespace fastsample
