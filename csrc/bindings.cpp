// fastsample._cpu: the CPU kernels on raw addresses. No torch header: the Python side checks tensors and passes
// data_ptr(), so one build serves every torch release. Whatever takes time releases the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <vector>

#include "common/key.h"
#include "cpu/amx.h"
#include "cpu/dispatch.h"
#include "cpu/lora_bindings.h"
#include "cpu/memory.h"
#include "cpu/threads.h"
#include "model_output.h"
#include "step_operands.h"

namespace py = pybind11;
using namespace fastsample;

namespace {

// A second thread is worth waking for 5 to 10 us of work each: so many elements of a plain step, or of normals. An image
// latent of 4x64x64 stays on the calling thread, where a busy machine cannot delay it.
constexpr int64_t kStepGrain = 32768;
constexpr int64_t kNoiseGrain = 16384;
constexpr int64_t kLockedStep = 1024;

// The step with everything fixed that stays the same from row to row; the Python side keeps the tensors alive.
class Step {
public:
    Step(Address rows, Address row_of, int64_t batch, int64_t size, Address x, Address keys, Address guidance,
         bool one_guidance, float rescale, bool thresholds, Address h1, Address h2, Address x0_out, Address input_out,
         Address second_input_out, int input_dtype)
        : one_guidance_(one_guidance), rescale_(rescale), thresholds_(thresholds) {
        fixed_.rows = at<const Row>(rows);
        fixed_.row_of = at<const int64_t>(row_of);
        fixed_.batch = batch;
        fixed_.size = size;
        fixed_.x = at<const float>(x);
        fixed_.keys = at<const uint64_t>(keys);
        fixed_.guidance = at<const float>(guidance);
        fixed_.h1 = at<const float>(h1);
        fixed_.h2 = at<const float>(h2);
        fixed_.x0_out = at<float>(x0_out);
        fixed_.input_out = at<void>(input_out);
        fixed_.second_input_out = at<void>(second_input_out);
        fixed_.input_dtype = input_dtype;
        if (rescale != 0) factors_.resize(batch);
        if (thresholds) {
            bounds_.resize(batch);
            scratch_.reset(new float[batch * size]);  // touched only as far as threads need it
        }
    }

    void operator()(int64_t row, Address m, int64_t m_stride, int m_dtype, bool guided, Address z, Address out,
                    bool keeps_x0, bool writes_input, int threads) {
        StepArgs args = fixed_;
        set_row(args, row, m, m_stride, m_dtype, guided, z, out, keeps_x0, writes_input);
        // Handing the lock over and back would take longer than a small step.
        if (fixed_.batch * fixed_.size <= kLockedStep) return run(&args, guided, threads);
        py::gil_scoped_release released;
        run(&args, guided, threads);
    }

    // A row that needs nothing beside the model's output; false, and nothing done, where that is none of `outputs`.
    bool plain(const PlainOutputs& outputs, Address out, int64_t row, py::handle m, bool keeps_x0, bool writes_input,
               int threads) {
        ModelOutput output;
        if (!outputs.read(m, &output)) return false;
        (*this)(row, output.address, output.stride, output.dtype, output.guided, 0, out, keeps_x0, writes_input, threads);
        return true;
    }

private:
    void run(StepArgs* args, bool guided, int threads) {
        const int64_t elements = args->batch * args->size;
        const bool rescales = guided && rescale_ != 0;
        if (rescales) {
            reduce(args, threads, [](const Job& job, int64_t sample, int64_t) {
                job.self->factors_[sample] = kernels().rescale_factor(job.args, sample, job.self->rescale_);
            });
            args->factors = factors_.data();
        }
        if (thresholds_) {
            reduce(args, threads, [](const Job& job, int64_t sample, int64_t first) {
                // Each thread stays in the place of its first sample.
                float* scratch = job.self->scratch_.get() + first * job.args->size;
                job.self->bounds_[sample] = kernels().threshold(job.args, sample, scratch);
            });
            args->bounds = bounds_.data();
        }
        const bool draws = !args->z && args->keys && (args->row_of || args->rows[args->row].s != 0.0f);
        const bool alike = !draws && !args->row_of && !rescales && !thresholds_ && (!guided || one_guidance_);
        if (alike && args->m_stride == args->size) {
            // Nothing tells the samples apart: one long sample has fewer partial vectors.
            args->size = args->m_stride = elements;
            args->batch = 1;
        }
        const int64_t blocks = args->batch * ((args->size + kBlock - 1) / kBlock);
        const auto body = [](const void* context, int64_t begin, int64_t end) {
            kernels().step(static_cast<const StepArgs*>(context), begin, end);
        };
        parallel(blocks, useful_threads(threads, elements, draws ? kNoiseGrain : kStepGrain), body, args);
    }

    struct Job {
        Step* self;
        const StepArgs* args;
        void (*one)(const Job&, int64_t sample, int64_t first);
    };

    void reduce(const StepArgs* args, int threads, void (*one)(const Job&, int64_t, int64_t)) {
        const Job job{this, args, one};
        const auto body = [](const void* context, int64_t begin, int64_t end) {
            const Job& job = *static_cast<const Job*>(context);
            for (int64_t sample = begin; sample < end; ++sample) job.one(job, sample, begin);
        };
        parallel(args->batch, useful_threads(threads, args->batch * args->size, kNoiseGrain), body, &job);
    }

    StepArgs fixed_{};
    bool one_guidance_;
    float rescale_;
    bool thresholds_;
    std::vector<float> factors_, bounds_;
    std::unique_ptr<float[]> scratch_;
};

struct NormalsJob {
    float* out;
    int64_t size;
    const uint64_t* keys;
    uint32_t step, stream;

    int64_t blocks() const { return (size + kBlock - 1) / kBlock; }
};

void randn(Address out, int64_t batch, int64_t size, Address keys, uint32_t step, uint32_t stream, int threads) {
    const NormalsJob job{at<float>(out), size, at<const uint64_t>(keys), step, stream};
    py::gil_scoped_release released;
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

void normals(Address out, int64_t first, int64_t count, uint64_t key, uint32_t step, uint32_t stream) {
    py::gil_scoped_release released;
    kernels().normals(at<float>(out), first, count, key, step, stream);
}

void sample_keys(Address out, int64_t batch, uint64_t seed, uint64_t index) {
    for (int64_t i = 0; i < batch; ++i) at<uint64_t>(out)[i] = sample_key(seed, index + (uint64_t)i);
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    std::array<uint32_t, 4> words;
    kernels().philox(counter.data(), key.data(), words.data());
    return words;
}

struct StreamJob {
    float* y;
    std::vector<const float*> x;
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
    kernels().copy(job.y + first, job.x[0] + first, count);
}

void copy(Address out, Address in, int64_t count, int threads) {
    stream<copy_part>(StreamJob{at<float>(out), {at<const float>(in)}, 0, 0, count}, threads);
}

void triad_part(const StreamJob& job, int64_t first, int64_t count) {
    kernels().triad(job.y, job.x.data(), static_cast<int>(job.x.size()), job.a, job.s, first, count);
}

void triad(Address y, const std::vector<Address>& x, float a, float s, int64_t count, int threads) {
    if (x.empty() || x.size() > 3) throw std::invalid_argument("triad adds 1 to 3 streams");
    StreamJob job{at<float>(y), {}, a, s, count};
    for (Address one : x) job.x.push_back(at<const float>(one));
    stream<triad_part>(job, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    py::class_<Step>(module, "Step")
        .def(py::init<Address, Address, int64_t, int64_t, Address, Address, Address, bool, float, bool, Address, Address,
                      Address, Address, Address, int>(),
             py::kw_only(), py::arg("rows"), py::arg("row_of"), py::arg("batch"), py::arg("size"), py::arg("x"),
             py::arg("keys"), py::arg("guidance"), py::arg("one_guidance"), py::arg("rescale"), py::arg("thresholds"),
             py::arg("h1"), py::arg("h2"), py::arg("x0_out"), py::arg("input_out"), py::arg("second_input_out"),
             py::arg("input_dtype"))
        .def("__call__", &Step::operator())
        .def("plain", &Step::plain);
    py::class_<PlainOutputs>(module, "PlainOutputs")
        .def(py::init<py::object, std::vector<std::tuple<py::object, int64_t, bool>>, std::array<py::object, 3>>());
    module.def("advise_huge_pages", [](Address address, int64_t bytes) { advise_huge_pages(at<void>(address), bytes); });
    module.def("randn", &randn);
    module.def("normals", &normals);
    module.def("philox", &philox);
    module.def("sample_keys", &sample_keys);
    module.def("copy", &copy);
    module.def("triad", &triad);
    bind_lora(module);
    module.def("isa", &isa);
    module.def("available_isas", &available_isas);
    module.def("set_isa", &set_isa);
    module.def("lora_isa", &lora_isa);
    module.def("lora_isas", &lora_isas);
    module.def("set_lora_isa", &set_lora_isa);
    module.def("isa_is_forced", &isa_is_forced);
    module.def("why_no_amx", &why_no_amx);
    module.def("thread_runtime", &thread_runtime);
    module.def("keep_to_this_thread", &keep_to_this_thread);
}
