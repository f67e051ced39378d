#include "streams.h"

#include <stdexcept>

#include "dispatch.h"
#include "threads.h"

namespace fastsample {
namespace {

struct StreamJob {
    float* y;
    std::vector<const float*> x;
    float a, s;
    int64_t count;
};

template <void (*Kernel)(const StreamJob&, int64_t, int64_t)>
void stream(const StreamJob& job, int threads) {
    const auto body = [](const void* context, int64_t begin, int64_t end) {
        const auto& job = *static_cast<const StreamJob*>(context);
        const int64_t first = begin * kBlock, last = end * kBlock < job.count ? end * kBlock : job.count;
        Kernel(job, first, last - first);
    };
    parallel((job.count + kBlock - 1) / kBlock, useful_threads(threads, job.count, kStepGrain), body, &job);
}

void copy_part(const StreamJob& job, int64_t first, int64_t count) {
    kernels().copy(job.y + first, job.x[0] + first, count);
}

void triad_part(const StreamJob& job, int64_t first, int64_t count) {
    kernels().triad(job.y, job.x.data(), static_cast<int>(job.x.size()), job.a, job.s, first, count);
}

}  // namespace

void copy(float* out, const float* in, int64_t count, int threads) {
    stream<copy_part>(StreamJob{out, {in}, 0, 0, count}, threads);
}

void triad(float* y, const std::vector<const float*>& x, float a, float s, int64_t count, int threads) {
    if (x.empty() || x.size() > 5) throw std::invalid_argument("triad adds 1 to 5 streams");
    stream<triad_part>(StreamJob{y, x, a, s, count}, threads);
}

}  // namespace fastsample
