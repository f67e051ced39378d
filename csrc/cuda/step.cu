// The sampling step, what fastsample/ops/step specifies: one pass over memory.
#include "common.h"

namespace fastsample {
namespace cuda {
namespace {

template <class T, int kCount, bool kDraws, bool kLearned, bool kBounds>
__global__ void __launch_bounds__(kBlockThreads, kBlocksResident) step_kernel(const DeviceStepArgs args) {
    each_thread<kCount>(args.batch, args.size, [&](int64_t sample, int64_t first, int count) {
        step_elements<T, kCount, kDraws, kLearned, kBounds>(args, sample, first, count);
    });
}

// The same, and what each warp has drawn of a sample: all its threads are there at the end. With eight elements a thread
// registers would be spilled.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kBlocksResident) log_prob_kernel(const DeviceStepArgs args) {
    Drawn drawn = {};
    each_thread<kPart>(args.batch, args.size, [&](int64_t sample, int64_t first, int count) {
        step_elements<T, kPart, true, true, true>(args, sample, first, count, &drawn);
    });
    static_assert(kLogProbPart == kWarp * kPart, "a part is what a warp has");
    const int lanes = blockDim.x < kWarp ? (int)blockDim.x : kWarp;
    double squares = drawn.squares, exponents = drawn.exponents;
    for (int distance = lanes / 2; distance; distance /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, distance);
        exponents += __shfl_xor_sync(0xffffffffu, exponents, distance);
    }
    if (threadIdx.x % lanes != 0) return;
    each_thread<kPart>(args.batch, args.size, [&](int64_t sample, int64_t first, int) {
        const int64_t parts = (args.size + kLogProbPart - 1) / kLogProbPart;
        double* const to = args.log_prob_sums + (sample * parts + first / kLogProbPart) * 2;
        to[0] = squares;
        to[1] = exponents;
    });
}

template <class T>
void launch_step(const DeviceStepArgs& args, cudaStream_t stream) {
    const bool draws = args.keys && !args.z, learned = args.m_stride != args.size;
    auto kernel = step_kernel<T, kPart, true, true, true>;
    int per_thread = kPart;
    if (args.log_prob_sums) {
        kernel = log_prob_kernel<T>;
    } else if (!args.low && all_whole(args)) {
        per_thread = kWhole;
        if (args.bounds) kernel = step_kernel<T, kWhole, true, true, true>;
        else if (draws && learned) kernel = step_kernel<T, kWhole, true, true, false>;
        else if (draws) kernel = step_kernel<T, kWhole, true, false, false>;
        else if (learned) kernel = step_kernel<T, kWhole, false, true, false>;
        else kernel = step_kernel<T, kWhole, false, false, false>;
    }
    const Shape shape = shape_of(args.batch, args.size, per_thread);
    launch(kernel, shape.grid, shape.block, args, stream);
}

}  // namespace

void step(const DeviceStepArgs& given, Stream to) {
    DeviceStepArgs args = given;
    const bool alike = !args.log_prob_sums && !args.low && !args.row_of && !args.keys && !args.uncond && !args.factors && !args.bounds;
    if (alike && args.m_stride == args.size) {
        // Nothing tells the samples apart: one long sample has fewer partial vectors.
        args.size = args.m_stride = args.batch * args.size;
        args.batch = 1;
    }
    const cudaStream_t stream = static_cast<cudaStream_t>(to);
    switch (args.m_dtype) {
        case kFloat16: return launch_step<Half>(args, stream);
        case kBFloat16: return launch_step<Bfloat>(args, stream);
        default: return launch_step<float>(args, stream);
    }
}

}  // namespace cuda
}  // namespace fastsample
