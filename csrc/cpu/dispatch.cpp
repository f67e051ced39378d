#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

#include "amx.h"

namespace fastsample {
namespace {

struct Level {
    const char* name;
    const Kernels* kernels;
    const LoraKernels* lora[kLayouts];  // null for the layouts of parts that this level does not make
    bool present;
};

const std::vector<Level>& levels() {
    static const std::vector<Level> all = [] {
        std::vector<Level> found{
            {"scalar", &scalar::kernels, {&scalar::lora_float, &scalar::lora_half, &scalar::lora_bfloat}, true}};
#if defined(FASTSAMPLE_X86)
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
#if defined(FASTSAMPLE_AMX)
        found.push_back({"amx",
                         &avx512::kernels,
                         {&avx512::lora_float, &avx512::lora_half, &amx::lora_bfloat, &amx::lora_float_parts,
                          &amx::lora_half_parts},
                         bf16 && why_no_amx().empty()});
#endif
#endif
#endif
        return found;
    }();
    return all;
}

const Level* find(const char* name) {
    for (const Level& level : levels())
        if (level.present && std::strcmp(level.name, name) == 0) return &level;
    return nullptr;
}

const Level* best() {
    const Level* chosen = nullptr;
    for (const Level& level : levels())
        if (level.present) chosen = &level;
    return chosen;
}

// What to multiply a dtype with, by what is known of CPUs; the same for every process on a machine.
const Level* best_for(int dtype) {
    const Level* level = best();
#if defined(FASTSAMPLE_X86)
    // Intel's cores with AVX512-BF16 run it at half the speed of float32's multiply-adds, AMD's at twice that speed.
    if (dtype == kBFloat16 && std::strcmp(level->name, "avx512-bf16") == 0 && __builtin_cpu_is("intel"))
        level = find("avx512");
#endif
    return level;
}

struct Choice {
    std::atomic<const Level*> isa{best()};
    std::atomic<const Level*> lora[3]{{best_for(kFloat32)}, {best_for(kFloat16)}, {best_for(kBFloat16)}};
    std::atomic<bool> forced{false};
};

Choice& current() {
    static Choice choice;
    return choice;
}

const Level& lora_level(int dtype) { return *current().lora[dtype].load(std::memory_order_relaxed); }

int layout_on(const Level& level, int dtype) {
    const int parts = dtype == kFloat32 ? kFloatParts : dtype == kFloat16 ? kHalfParts : -1;
    return parts >= 0 && level.lora[parts] ? parts : dtype;
}

// The first level with this one's arithmetic for the dtype: avx512-bf16 multiplies floats as avx512 does.
const Level* plainest(const Level* level, int dtype) {
    const int layout = layout_on(*level, dtype);
    for (const Level& other : levels())
        if (other.present && layout_on(other, dtype) == layout && other.lora[layout] == level->lora[layout]) return &other;
    return level;
}

const Level* require(const std::string& name) {
    if (const Level* level = find(name.c_str())) return level;
    std::string known;
    for (const std::string& one : available_isas()) known += (known.empty() ? "" : ", ") + one;
    const std::string why = name == "amx" ? " (" + why_no_amx() + ")" : "";
    throw std::invalid_argument("instruction set '" + name + "' is unknown or absent here" + why +
                                "; this CPU and build have " + known);
}

}  // namespace

const Kernels& kernels() { return *current().isa.load(std::memory_order_relaxed)->kernels; }

const LoraKernels& lora_kernels(int layout) {
    if (layout < 0 || layout >= kLayouts) throw std::invalid_argument("layout " + std::to_string(layout) + " is unknown");
    if (const LoraKernels* own = lora_level(dtype_of(layout)).lora[layout]) return *own;
    // Packed before another level was asked for: who made the parts reads them.
    if (const LoraKernels* maker = best()->lora[layout]) return *maker;
    throw std::runtime_error("these weights were packed for AMX, which is absent here: pack them again");
}

int lora_layout(int dtype) { return layout_on(lora_level(dtype), dtype); }

std::string isa() { return current().isa.load()->name; }

std::string lora_isa(int dtype) { return plainest(&lora_level(dtype), dtype)->name; }

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Level& level : levels())
        if (level.present) names.emplace_back(level.name);
    return names;
}

std::vector<std::string> lora_isas(int dtype) {
    std::vector<std::string> names{plainest(best_for(dtype), dtype)->name};
    for (auto level = levels().rbegin(); level != levels().rend(); ++level)
        if (level->present && plainest(&*level, dtype) == &*level && names[0] != level->name) names.emplace_back(level->name);
    return names;
}

void set_isa(const std::string& name) {
    const Level* level = require(name);
    current().isa.store(level);
    for (auto& lora : current().lora) lora.store(level);
    current().forced.store(true);
}

void set_lora_isa(int dtype, const std::string& name) { current().lora[dtype].store(require(name)); }

bool isa_is_forced() { return current().forced.load(std::memory_order_relaxed); }

}  // namespace fastsample
