// The mean and the log variance of what a step draws from, what fastsample/ops/posterior specifies: one pass over memory.
#include "common.h"

namespace fastsample {
namespace cuda {
namespace {

template <class T, int kCount>
__global__ void __launch_bounds__(kBlockThreads, kBlocksResident) posterior_kernel(const PosteriorArgs args) {
    each_thread<kCount>(args.batch, args.size, [&](int64_t sample, int64_t first, int count) {
        DeviceStepArgs mean = args;
        // Known here, so that nothing is compiled for them.
        mean.uncond = mean.input_out = mean.second_input_out = nullptr;
        mean.factors = mean.bounds = mean.h1 = mean.h2 = mean.h3 = mean.z = mean.x0_out = nullptr;
        mean.keys = nullptr;
        step_elements<T, kCount, false, false, false>(mean, sample, first, count);
        if (!args.log_variance) return;
        const float constant = args.constant[sample], slope = args.slope[sample];
        F v[kCount];
        for (int i = 0; i < kCount; ++i) v[i] = constant;
        if (slope != 0.0f) {
            load<kCount>((const T*)args.m + sample * args.m_stride + args.size + first, count, v);
            for (int i = 0; i < kCount; ++i) v[i] = fma(splat(slope), v[i], splat(constant));
        }
        store<kCount>(args.log_variance + sample * args.size + first, count, v);
    });
}

template <class T>
void launch_posterior(const PosteriorArgs& args, cudaStream_t stream) {
    const bool whole = all_whole(args) && aligned(args.log_variance);
    const Shape shape = shape_of(args.batch, args.size, whole ? kWhole : kPart);
    launch(whole ? posterior_kernel<T, kWhole> : posterior_kernel<T, kPart>, shape.grid, shape.block, args, stream);
}

}  // namespace

void posterior(const PosteriorArgs& args, Stream to) {
    const cudaStream_t stream = static_cast<cudaStream_t>(to);
    switch (args.m_dtype) {
        case kFloat16: return launch_posterior<Half>(args, stream);
        case kBFloat16: return launch_posterior<Bfloat>(args, stream);
        default: return launch_posterior<float>(args, stream);
    }
}

}  // namespace cuda
}  // namespace fastsample
