// The module: what fastsample._cpu offers for lora_linear, with the kernels for AMX alone.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../../../csrc/cpu/dispatch.h"
#include "../../../csrc/cpu/lora_bindings.h"
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
    module.def("lora_isa", [](int) { return "amx"; });
    module.def("isa_is_forced", [] { return true; });
    // One product on addresses: sums += x w, (16, 16) floats and (16, 32) and (16, 16, 2) bfloat16.
    module.def("tile_product", [](uintptr_t sums, uintptr_t x, uintptr_t w) {
        struct alignas(64) {
            uint8_t palette = 1, rest[15] = {};
            uint16_t bytes[16] = {64, 64, 64};
            uint8_t rows[16] = {16, 16, 16};
        } configuration;
        amx_on_cpu::configure(&configuration);
        amx_on_cpu::load(0, reinterpret_cast<void*>(sums), 64);
        amx_on_cpu::load(1, reinterpret_cast<void*>(x), 64);
        amx_on_cpu::load(2, reinterpret_cast<void*>(w), 64);
        amx_on_cpu::multiply(0, 1, 2);
        amx_on_cpu::store(0, reinterpret_cast<void*>(sums), 64);
        amx_on_cpu::release();
    });
    module.def("take_counts", [] {
        const amx_on_cpu::Counts counts = amx_on_cpu::take_counts();
        return pybind11::make_tuple(counts.products, counts.loads, counts.stores, counts.configured);
    });
}
