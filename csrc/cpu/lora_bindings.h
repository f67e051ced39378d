// What lora_linear needs of fastsample._cpu, on raw addresses like the rest of it.
#pragma once
#include <pybind11/pybind11.h>

namespace fastsample {

void bind_lora(pybind11::module_& module);

}  // namespace fastsample
