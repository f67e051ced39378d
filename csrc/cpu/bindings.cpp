// fastsample._cpu: the CPU kernels on raw addresses. No torch header: the Python side checks tensors and passes
// data_ptr(), so one build serves every torch release. Whatever takes time releases the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "../common/address.h"
#include "../common/step_operands.h"
#include "amx.h"
#include "bend.h"
#include "dispatch.h"
#include "lora_bindings.h"
#include "memory.h"
#include "model_output.h"
#include "noise.h"
#include "step.h"
#include "streams.h"
#include "threads.h"

namespace py = pybind11;
using namespace fastsample;

namespace {

constexpr int64_t kLockedStep = 1024;

void run_step(Step& step, int64_t row, Address m, int64_t m_stride, int m_dtype, bool guided, Address z, Address out,
              bool keeps_x0, bool writes_input, int threads) {
    StepArgs args = step.fixed();
    set_row(args, row, m, m_stride, m_dtype, guided, z, out, keeps_x0, writes_input);
    // Handing the lock over and back would take longer than a small step.
    if (step.elements() <= kLockedStep) return step.run(args, threads);
    py::gil_scoped_release released;
    step.run(args, threads);
}

// A row that needs nothing beside the model's output; false, and nothing done, where that is none of `outputs`.
bool run_plain_step(Step& step, const PlainOutputs& outputs, Address out, int64_t row, py::handle m, bool keeps_x0,
                    bool writes_input, int threads) {
    ModelOutput output;
    if (!outputs.read(m, &output)) return false;
    run_step(step, row, output.address, output.stride, output.dtype, output.guided, 0, out, keeps_x0, writes_input, threads);
    return true;
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    std::array<uint32_t, 4> words;
    kernels().philox(counter.data(), key.data(), words.data());
    return words;
}

void bend_halves(Address m, int64_t m_stride, int m_dtype, int64_t batch, int64_t size, Address weights, Address moved,
                 float momentum, Address out, int method, double rescale, double eta, double norm_threshold, int threads) {
    BendArgs args{};
    args.batch = batch;
    args.size = size;
    args.uncond = at<const void>(m);
    args.cond = at<const void>(m + batch * m_stride * (m_dtype == kFloat32 ? 4 : 2));
    args.m_stride = m_stride;
    args.m_dtype = m_dtype;
    args.weights = at<const float>(weights);
    args.moved = at<float>(moved);
    args.momentum = momentum;
    args.out = at<float>(out);
    const py::gil_scoped_release released;
    bend(args, {method, rescale, eta, norm_threshold}, threads);
}

void bind_noise(py::module_& module) {
    module.def("randn", [](Address out, int64_t batch, int64_t size, Address keys, uint32_t step, uint32_t stream, int threads) {
        py::gil_scoped_release released;
        randn(at<float>(out), batch, size, at<const uint64_t>(keys), step, stream, threads);
    });
    module.def("normals", [](Address out, int64_t first, int64_t count, uint64_t key, uint32_t step, uint32_t stream) {
        py::gil_scoped_release released;
        kernels().normals(at<float>(out), first, count, key, step, stream);
    });
    module.def("philox", &philox);
    module.def("sample_keys", [](Address out, int64_t batch, uint64_t seed, uint64_t index) {
        sample_keys(at<uint64_t>(out), batch, seed, index);
    });
}

void bind_streams(py::module_& module) {
    module.def("copy", [](Address out, Address in, int64_t count, int threads) {
        py::gil_scoped_release released;
        copy(at<float>(out), at<const float>(in), count, threads);
    });
    module.def("triad", [](Address y, const std::vector<Address>& x, float a, float s, int64_t count, int threads) {
        std::vector<const float*> streams;
        for (Address one : x) streams.push_back(at<const float>(one));
        py::gil_scoped_release released;
        triad(at<float>(y), streams, a, s, count, threads);
    });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    bind_step<Step, bool>(module, "one_guidance").def("__call__", &run_step).def("plain", &run_plain_step);
    py::class_<PlainOutputs>(module, "PlainOutputs")
        .def(py::init<py::object, std::vector<std::tuple<py::object, int64_t, bool>>, std::array<py::object, 3>>());
    module.def("log_prob_parts", [](int64_t, int64_t size) { return log_prob_parts(size); });
    module.def("bend", &bend_halves);
    bind_noise(module);
    bind_streams(module);
    bind_lora(module);
    module.def("advise_huge_pages", [](Address address, int64_t bytes) { advise_huge_pages(at<void>(address), bytes); });
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
