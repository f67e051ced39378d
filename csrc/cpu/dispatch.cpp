#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace fastsample {
namespace {

struct Level {
    const char* name;
    const Kernels* kernels;
    const LoraKernels* lora[3];  // by DType
    bool present;
};

const std::vector<Level>& levels() {
    static const std::vector<Level> all = [] {
        std::vector<Level> found{
            {"scalar", &scalar::kernels, {&scalar::lora_float, &scalar::lora_half, &scalar::lora_bfloat}, true}};
#if defined(__x86_64__)
        __builtin_cpu_init();
        // Every CPU with AVX2 converts halves (F16C), which older compilers cannot ask for.
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        found.push_back({"avx2", &avx2::kernels, {&avx2::lora_float, &avx2::lora_half, &avx2::lora_bfloat}, avx2});
        found.push_back({"avx512",
                         &avx512::kernels,
                         {&avx512::lora_float, &avx512::lora_half, &avx512::lora_bfloat},
                         avx512});
#if defined(FASTSAMPLE_AVX512_BF16)
        const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
        found.push_back({"avx512-bf16",
                         &avx512::kernels,
                         {&avx512::lora_float, &avx512::lora_half, &avx512_bf16::lora_bfloat},
                         bf16});
#endif
#endif
        return found;
    }();
    return all;
}

const Level* best() {
    const Level* chosen = nullptr;
    for (const Level& level : levels())
        if (level.present) chosen = &level;
    return chosen;
}

std::atomic<const Level*>& current() {
    static std::atomic<const Level*> level{best()};
    return level;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed)->kernels; }

const LoraKernels& lora_kernels(int dtype) { return *current().load(std::memory_order_relaxed)->lora[dtype]; }

std::string isa() { return current().load()->name; }

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Level& level : levels())
        if (level.present) names.emplace_back(level.name);
    return names;
}

void set_isa(const std::string& name) {
    std::string known;
    for (const Level& level : levels()) {
        if (level.present && name == level.name) {
            current().store(&level);
            return;
        }
        if (level.present) known += (known.empty() ? "" : ", ") + std::string(level.name);
    }
    throw std::invalid_argument("instruction set '" + name + "' is unknown or absent here; this CPU and build have " +
                                known);
}

}  // namespace fastsample
