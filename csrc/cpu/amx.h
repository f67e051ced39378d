#pragma once
#include <string>

namespace fastsample {

// Why this process cannot multiply on AMX's bfloat16 tiles; empty where it can. The first call asks the system for the
// permission that a process needs, which children inherit and exec loses.
const std::string& why_no_amx();

}  // namespace fastsample
