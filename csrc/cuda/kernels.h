// What the CUDA kernels provide: one launch each, on the device that is current, without a synchronisation or an
// allocation, so that all of it can be captured in a graph. Addresses are the device's.
#pragma once
#include <stdint.h>

#include "../common/step_args.h"

namespace fastsample {
namespace cuda {

typedef void* Stream;  // a cudaStream_t

// Row numbers in row_of are not checked by the host: negative ones count from the end, and any other gives NaNs.
struct DeviceStepArgs : StepArgs {
    int64_t row_count;
};

void step(const DeviceStepArgs& args, Stream stream);

// The step leaves sums of parts of a sample: of the elements that a warp has.
constexpr int64_t kLogProbPart = 128;

// The step without noise into args.out, and constant + slope v, of each sample, into log_variance where that is wanted.
struct PosteriorArgs : DeviceStepArgs {
    const float *constant, *slope;
    float* log_variance;
};
void posterior(const PosteriorArgs& args, Stream stream);

struct NormalsArgs {
    float* out;
    int64_t batch, size;
    const uint64_t* keys;  // one per sample
    uint32_t step, stream;
};
void normals(const NormalsArgs& args, Stream stream);

// phi std(m_cond) / std(m) + 1 - phi of each sample into `factors`. moments: 4 doubles for each chunk of each sample.
void rescale_factors(const DeviceStepArgs& args, float phi, double* moments, float* factors, Stream stream);

// A sample's order statistic, while it is being found: see threshold.cu.
struct Selection {
    unsigned long long counts[2048 + 1024 + 1024];  // three histograms, of each digit
    int64_t below[3], through;                       // values below what the digits so far stand for, and up to it
    uint32_t prefix[3];                              // the digits so far
    uint32_t next;                                   // the smallest value above the one found
    uint32_t has_nan, unused;
};
// The bound of dynamic thresholding of each sample into `bounds`. sizes: of |x0|, as many as x has elements.
void thresholds(const DeviceStepArgs& args, Selection* selections, float* sizes, float* bounds, Stream stream);

// Of each sample's elements one block of a reduction takes so many: fixed, so that sums do not depend on the device.
constexpr int64_t kChunk = 8192;

// The lower bound that benchmarks compare with.
void copy(void* out, const void* in, int64_t bytes, Stream stream);

// A kernel, whose attributes tell whether a device can run what was compiled.
const void* smallest_kernel();

}  // namespace cuda
}  // namespace fastsample
