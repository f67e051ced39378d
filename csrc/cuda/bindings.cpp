// fastsample._cuda: the CUDA kernels on raw device addresses, launched on the stream that they are given. No torch
// header: the Python side checks tensors and passes data_ptr(). Nothing here waits for the device, allocates on it or
// reads from it; a launch waits for room in the queue, so the GIL is released.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "../common/address.h"
#include "../common/step_operands.h"
#include "device.h"
#include "kernels.h"

namespace py = pybind11;
using namespace fastsample;

namespace {

// What the reductions keep between their kernels, one part after the other, each aligned to 128 bits.
class Workspace {
public:
    Workspace(Address base, int64_t batch, int64_t size, bool rescales, bool thresholds) : base_(base) {
        if (rescales) {
            const int64_t chunks = (size + cuda::kChunk - 1) / cuda::kChunk;
            moments = take<double>(4 * chunks * batch);
            factors = take<float>(batch);
        }
        if (thresholds) {
            selections = take<cuda::Selection>(batch);
            bounds = take<float>(batch);
            sizes = take<float>(batch * size);
        }
    }

    int64_t bytes() const { return used_; }

    double* moments = nullptr;
    cuda::Selection* selections = nullptr;
    float *factors = nullptr, *bounds = nullptr, *sizes = nullptr;

private:
    template <class T>
    T* take(int64_t count) {
        T* const part = at<T>(base_ + used_);
        used_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
        return part;
    }

    Address base_;
    int64_t used_ = 0;
};

// The step with everything fixed that stays the same from row to row; the Python side keeps the tensors alive.
class Step {
public:
    Step(const StepArgs& fixed, float rescale, bool thresholds, int64_t row_count, Address workspace, int device)
        : fixed_{fixed, row_count},
          workspace_(workspace, fixed.batch, fixed.size, rescale != 0, thresholds),
          rescale_(rescale),
          thresholds_(thresholds),
          device_(device) {}

    void operator()(int64_t row, Address m, int64_t m_stride, int m_dtype, bool guided, Address z, Address out,
                    bool keeps_x0, bool writes_input, Address stream) {
        cuda::DeviceStepArgs args = fixed_;
        set_row(args, row, m, m_stride, m_dtype, guided, z, out, keeps_x0, writes_input);
        const py::gil_scoped_release released;
        const cuda::DeviceGuard guard(device_);
        if (guided && rescale_ != 0) {
            cuda::rescale_factors(args, rescale_, workspace_.moments, workspace_.factors, at<void>(stream));
            args.factors = workspace_.factors;
        }
        if (thresholds_) {
            cuda::thresholds(args, workspace_.selections, workspace_.sizes, workspace_.bounds, at<void>(stream));
            args.bounds = workspace_.bounds;
        }
        cuda::step(args, at<void>(stream));
    }

private:
    cuda::DeviceStepArgs fixed_;
    Workspace workspace_;
    float rescale_;
    bool thresholds_;
    int device_;
};

void randn(Address out, int64_t batch, int64_t size, Address keys, uint32_t step, uint32_t stream_id, Address stream,
           int device) {
    const py::gil_scoped_release released;
    const cuda::DeviceGuard guard(device);
    cuda::normals({at<float>(out), batch, size, at<const uint64_t>(keys), step, stream_id}, at<void>(stream));
}

void posterior(Address rows, int64_t row_count, Address row_of, int64_t row, int64_t batch, int64_t size, Address x,
               Address m, int64_t m_stride, int m_dtype, Address constant, Address slope, Address mean,
               Address log_variance, Address stream, int device) {
    cuda::PosteriorArgs args{};
    args.rows = at<const Row>(rows);
    args.row_count = row_count;
    args.row_of = at<const int64_t>(row_of);
    args.row = row;
    args.batch = batch;
    args.size = size;
    args.x = at<const float>(x);
    args.m = at<const void>(m);
    args.m_stride = m_stride;
    args.m_dtype = m_dtype;
    args.constant = at<const float>(constant);
    args.slope = at<const float>(slope);
    args.out = at<float>(mean);
    args.log_variance = at<float>(log_variance);
    const py::gil_scoped_release released;
    const cuda::DeviceGuard guard(device);
    cuda::posterior(args, at<void>(stream));
}

void copy(Address out, Address in, int64_t bytes, Address stream, int device) {
    const py::gil_scoped_release released;
    const cuda::DeviceGuard guard(device);
    cuda::copy(at<void>(out), at<const void>(in), bytes, at<void>(stream));
}

int64_t step_workspace(int64_t batch, int64_t size, bool rescales, bool thresholds) {
    return Workspace(0, batch, size, rescales, thresholds).bytes();
}

// What setup.py compiled for: "90" machine code, "120-virtual" PTX.
std::vector<std::string> architectures() {
    std::vector<std::string> names;
#ifdef FASTSAMPLE_CUDA_ARCHITECTURES
    std::istringstream all(FASTSAMPLE_CUDA_ARCHITECTURES);
    for (std::string name; std::getline(all, name, ',');) names.push_back(name);
#endif
    return names;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    bind_step<Step, int64_t, Address, int>(module, "row_count", "workspace", "device")
        .def("__call__", &Step::operator());
    module.def("step_workspace", &step_workspace);
    module.def("log_prob_parts", [](int64_t, int64_t size) {
        return (size + cuda::kLogProbPart - 1) / cuda::kLogProbPart;
    });
    module.def("randn", &randn);
    module.def("posterior", &posterior);
    module.def("copy", &copy);
    module.def("driver", &cuda::driver);
    module.def("supports", &cuda::supports);
    module.def("architectures", &architectures);
}
