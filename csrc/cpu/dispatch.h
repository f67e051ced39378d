#pragma once
#include <string>
#include <vector>

#include "kernels.h"
#include "lora.h"

namespace fastsample {

// The kernels of the instruction set in use: at first the best that this CPU has.
const Kernels& kernels();

// The arithmetic of lora_linear for this dtype on that instruction set.
const LoraKernels& lora_kernels(int dtype);

// Its name: scalar, avx2, avx512 or avx512-bf16 (which differs from avx512 only in the kernels that multiply matrices).
std::string isa();

// The levels that this build and this CPU have, worst first.
std::vector<std::string> available_isas();

// Throws std::invalid_argument, naming the levels that exist, for a level that is unknown or absent.
void set_isa(const std::string& name);

}  // namespace fastsample
