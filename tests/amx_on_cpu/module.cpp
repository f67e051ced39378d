// The module: what fastsample._cpu offers for lora_linear, with the kernels for AMX alone.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/lora_bindings.h"
#include "amx_on_cpu.h"

namespace fastsample {

const LoraKernels& lora_kernels(int layout) {
    if (layout == kBFloat16) return amx::lora_bfloat;
    if (layout == kFloatParts) return amx::lora_float_parts;
    if (layout == kHalfParts) return amx::lora_half_parts;
    throw std::runtime_error("a layout that AMX does not make");
}

int lora_layout(int dtype) { return dtype == kFloat32 ? kFloatParts : dtype == kFloat16 ? kHalfParts : dtype; }

}  // namespace fastsample

PYBIND11_MODULE(_amx, module) {
    fastsample::bind_lora(module);
    module.def("take_counts", [] {
        const amx_on_cpu::Counts counts = amx_on_cpu::take_counts();
        return pybind11::make_tuple(counts.products, counts.loads, counts.stores, counts.configured);
    });
}
