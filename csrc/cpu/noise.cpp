#include "noise.h"

#include "../common/key.h"
#include "dispatch.h"
#include "threads.h"

namespace fastsample {
namespace {

struct NormalsJob {
    float* out;
    int64_t size;
    const uint64_t* keys;
    uint32_t step, stream;

    int64_t blocks() const { return (size + kBlock - 1) / kBlock; }
};

}  // namespace

void randn(float* out, int64_t batch, int64_t size, const uint64_t* keys, uint32_t step, uint32_t stream, int threads) {
    const NormalsJob job{out, size, keys, step, stream};
    const auto body = [](const void* context, int64_t begin, int64_t end) {
        const auto& job = *static_cast<const NormalsJob*>(context);
        for (int64_t k = begin; k < end; ++k) {
            const int64_t sample = k / job.blocks(), first = k % job.blocks() * kBlock;
            const int64_t left = job.size - first;
            kernels().normals(job.out + sample * job.size + first, first, left < kBlock ? left : kBlock,
                              job.keys[sample], job.step, job.stream);
        }
    };
    parallel(batch * job.blocks(), useful_threads(threads, batch * size, kNoiseGrain), body, &job);
}

void sample_keys(uint64_t* out, int64_t batch, uint64_t seed, uint64_t index) {
    for (int64_t i = 0; i < batch; ++i) out[i] = sample_key(seed, index + (uint64_t)i);
}

}  // namespace fastsample
