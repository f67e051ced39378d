// From the operands that Python names to a step's arguments: what both bindings of Step share.
#pragma once
#include <pybind11/pybind11.h>

#include "address.h"
#include "step_args.h"

namespace fastsample {

// Binds Step(rows=, row_of=, ..., input_dtype=, names=), whose arguments stay the same from row to row, as
// Step(StepArgs, rescale, thresholds, own...); the Python side keeps the tensors alive. `Own` are the types of a binding's
// own arguments and `names` what they are called.
template <class Step, class... Own, class... Names>
pybind11::class_<Step> bind_step(pybind11::module_& module, Names... names) {
    using pybind11::arg;
    const auto make = [](Address rows, Address row_of, int64_t batch, int64_t size, Address x, Address keys,
                         Address guidance, float rescale, bool thresholds, Address h1, Address h2, Address h3,
                         Address x0_out, Address input_out, Address second_input_out, int input_dtype,
                         Address low, Address high, Address log_prob_sums, Own... own) {
        StepArgs args{};
        args.rows = at<const Row>(rows);
        args.row_of = at<const int64_t>(row_of);
        args.batch = batch;
        args.size = size;
        args.x = at<const float>(x);
        args.keys = at<const uint64_t>(keys);
        args.guidance = at<const float>(guidance);
        args.h1 = at<const float>(h1);
        args.h2 = at<const float>(h2);
        args.h3 = at<const float>(h3);
        args.x0_out = at<float>(x0_out);
        args.input_out = at<void>(input_out);
        args.second_input_out = at<void>(second_input_out);
        args.input_dtype = input_dtype;
        args.low = at<const float>(low);
        args.high = at<const float>(high);
        args.log_prob_sums = at<double>(log_prob_sums);
        return new Step(args, rescale, thresholds, own...);
    };
    return pybind11::class_<Step>(module, "Step")
        .def(pybind11::init(make), pybind11::kw_only(), arg("rows"), arg("row_of"), arg("batch"), arg("size"), arg("x"),
             arg("keys"), arg("guidance"), arg("rescale"), arg("thresholds"), arg("h1"), arg("h2"), arg("h3"),
             arg("x0_out"), arg("input_out"), arg("second_input_out"), arg("input_dtype"), arg("low"), arg("high"), arg("log_prob_sums"),
             arg(names)...);
}

// What differs from row to row. m: the model's output, m_stride elements from sample to sample, the unconditional half
// first where `guided`.
inline void set_row(StepArgs& args, int64_t row, Address m, int64_t m_stride, int m_dtype, bool guided, Address z,
                    Address out, bool keeps_x0, bool writes_input) {
    args.row = row;
    args.m_stride = m_stride;
    args.m_dtype = m_dtype;
    args.uncond = guided ? at<const void>(m) : nullptr;
    args.m = at<const void>(guided ? m + args.batch * m_stride * (m_dtype == kFloat32 ? 4 : 2) : m);
    args.z = at<const float>(z);
    args.out = at<float>(out);
    if (!keeps_x0) args.x0_out = nullptr;
    if (!writes_input) args.input_out = args.second_input_out = nullptr;
}

}  // namespace fastsample
