// From the addresses that Python gives to a step's arguments: what both bindings of Step share.
#pragma once
#include "common/step_args.h"

namespace fastsample {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
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
