// fastsample._cpu: the CPU kernels on raw addresses. No torch header: the Python side checks tensors and passes
// data_ptr(), so one build serves every torch release. Every function releases the GIL while it works.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/threads.h"

namespace py = pybind11;
using namespace fastsample;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// A second thread is worth waking for 5 to 10 us of work each: so many elements of a plain step, or of normals. An image
// latent of 4x64x64 stays on the calling thread, where a busy machine cannot delay it.
constexpr int64_t kStepGrain = 32768;
constexpr int64_t kNoiseGrain = 16384;

int useful_threads(int threads, int64_t elements, int64_t grain) {
    const int64_t most = elements / grain;
    return most < threads ? static_cast<int>(most) : threads;
}

void step(Address rows, int64_t row, int64_t batch, int64_t size, Address x, Address m, int64_t m_stride, int m_dtype,
          Address z, Address seeds, uint32_t noise_step, Address out, Address x0_out, Address input_out,
          int input_dtype, int threads) {
    StepArgs args{at<const Row>(rows) + row, batch, size, at<const float>(x), at<const void>(m), m_stride, m_dtype,
                  at<const float>(z), at<const uint64_t>(seeds), noise_step, at<float>(out), at<float>(x0_out),
                  at<void>(input_out), input_dtype};
    const bool draws = args.row->s != 0.0f && !z;
    py::gil_scoped_release released;
    if (!draws && m_stride == size) {
        // Nothing tells the samples apart: one long sample has fewer partial vectors.
        args.size = args.m_stride = batch * size;
        args.batch = 1;
    }
    const int64_t blocks = args.batch * ((args.size + kBlock - 1) / kBlock);
    const auto body = [](const void* context, int64_t begin, int64_t end) {
        kernels().step(static_cast<const StepArgs*>(context), begin, end);
    };
    parallel(blocks, useful_threads(threads, batch * size, draws ? kNoiseGrain : kStepGrain), body, &args);
}

struct NormalsJob {
    float* out;
    int64_t size;
    const uint64_t* seeds;
    uint32_t step, stream;

    int64_t blocks() const { return (size + kBlock - 1) / kBlock; }
};

void randn(Address out, int64_t batch, int64_t size, Address seeds, uint32_t step, uint32_t stream, int threads) {
    const NormalsJob job{at<float>(out), size, at<const uint64_t>(seeds), step, stream};
    py::gil_scoped_release released;
    const auto body = [](const void* context, int64_t begin, int64_t end) {
        const auto& job = *static_cast<const NormalsJob*>(context);
        for (int64_t k = begin; k < end; ++k) {
            const int64_t sample = k / job.blocks(), first = k % job.blocks() * kBlock;
            const int64_t left = job.size - first;
            kernels().normals(job.out + sample * job.size + first, first, left < kBlock ? left : kBlock,
                              job.seeds[sample], job.step, job.stream);
        }
    };
    parallel(batch * job.blocks(), useful_threads(threads, batch * size, kNoiseGrain), body, &job);
}

void normals(Address out, int64_t first, int64_t count, uint64_t seed, uint32_t step, uint32_t stream) {
    py::gil_scoped_release released;
    kernels().normals(at<float>(out), first, count, seed, step, stream);
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    std::array<uint32_t, 4> words;
    kernels().philox(counter.data(), key.data(), words.data());
    return words;
}

struct StreamJob {
    float* y;
    const float* x;
    float a, s;
    int64_t count;
};

template <void (*Kernel)(const StreamJob&, int64_t, int64_t)>
void stream(const StreamJob& job, int threads) {
    py::gil_scoped_release released;
    const auto body = [](const void* context, int64_t begin, int64_t end) {
        const auto& job = *static_cast<const StreamJob*>(context);
        const int64_t first = begin * kBlock, last = end * kBlock < job.count ? end * kBlock : job.count;
        Kernel(job, first, last - first);
    };
    parallel((job.count + kBlock - 1) / kBlock, useful_threads(threads, job.count, kStepGrain), body, &job);
}

void copy_part(const StreamJob& job, int64_t first, int64_t count) {
    kernels().copy(job.y + first, job.x + first, count);
}

void copy(Address out, Address in, int64_t count, int threads) {
    stream<copy_part>(StreamJob{at<float>(out), at<const float>(in), 0, 0, count}, threads);
}

void triad_part(const StreamJob& job, int64_t first, int64_t count) {
    kernels().triad(job.y + first, job.x + first, job.a, job.s, count);
}

void triad(Address y, Address x, float a, float s, int64_t count, int threads) {
    stream<triad_part>(StreamJob{at<float>(y), at<const float>(x), a, s, count}, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.def("step", &step);
    module.def("advise_huge_pages", [](Address address, int64_t bytes) { advise_huge_pages(at<void>(address), bytes); });
    module.def("randn", &randn);
    module.def("normals", &normals);
    module.def("philox", &philox);
    module.def("copy", &copy);
    module.def("triad", &triad);
    module.def("isa", &isa);
    module.def("available_isas", &available_isas);
    module.def("set_isa", &set_isa);
    module.def("thread_runtime", &thread_runtime);
}
