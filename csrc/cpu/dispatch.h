#pragma once
#include <string>
#include <vector>

#include "kernels.h"
#include "lora.h"

namespace fastsample {

// The kernels of the instruction set in use: at first the best that this CPU has.
const Kernels& kernels();

// The arithmetic of lora_linear for weights of this layout, and the layout that weights of a dtype get on its level.
const LoraKernels& lora_kernels(int layout);
int lora_layout(int dtype);

// The level in use: scalar, avx2, avx512, avx512-bf16 or amx (the last two differ from avx512 only in the kernels that
// multiply matrices).
std::string isa();

// The levels that this build and this CPU have, worst first.
std::vector<std::string> available_isas();

// Of lora_linear alone and one dtype: the level in use, and those whose arithmetic differs, the one that is known to be
// the fastest first.
std::string lora_isa(int dtype);
std::vector<std::string> lora_isas(int dtype);

// Both throw std::invalid_argument, naming the levels that exist, for a level that is unknown or absent. The first also
// sets what lora_linear uses for every dtype.
void set_isa(const std::string& name);
void set_lora_isa(int dtype, const std::string& name);

// Whether set_isa was called: then nobody measures which level is the fastest.
bool isa_is_forced();

}  // namespace fastsample
