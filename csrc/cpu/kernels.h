// What every instruction set provides. Plain structs and pointers only: this header is compiled by each of them.
#pragma once
#include <stdint.h>

#include "../common/step_args.h"

// FASTSAMPLE_GENERIC leaves scalar alone, which is what CPUs of other families have.
#if defined(__x86_64__) && !defined(FASTSAMPLE_GENERIC)
#define FASTSAMPLE_X86
#endif

namespace fastsample {

// Blocks of one sample stay in L1: 2048 floats are 8 KiB a stream.
constexpr int64_t kBlock = 2048;

inline int64_t log_prob_parts(int64_t size) { return (size + kBlock - 1) / kBlock; }

// Sums over a block of both halves of a model's output, c and u, of what moves, d, and of their products.
struct BendSums {
    double c, u, d, cc, uu, dd, cu, cd, ud;
};

struct BendArgs {
    int64_t batch, size;
    const void *cond, *uncond;  // m_stride elements from sample to sample
    int64_t m_stride;
    int m_dtype;
    const float* weights;  // one per sample
    float* moved;          // of all samples; null without momentum
    float momentum;
    float* out;             // m_stride elements from sample to sample
    BendSums* sums;         // one per block
    const float* shares;    // of c, u and d in m, three per sample
};

struct Kernels {
    // Work on blocks [begin, end), numbered through all samples; a sample has ceil(size / kBlock) of them.
    void (*step)(const StepArgs* args, int64_t begin, int64_t end);
    // phi std(m_cond) / std(m) + 1 - phi of one sample.
    float (*rescale_factor)(const StepArgs* args, int64_t sample, float phi);
    // The bound of dynamic thresholding of one sample; scratch holds `size` floats.
    float (*threshold)(const StepArgs* args, int64_t sample, float* scratch);
    // Work on blocks as step does: the first writes sums and what moves, the second the output that the shares make.
    void (*bend_sums)(const BendArgs* args, int64_t begin, int64_t end);
    void (*bend)(const BendArgs* args, int64_t begin, int64_t end);
    // Normals number [first, first + count) of one sample's stream; first is a multiple of 4.
    void (*normals)(float* out, int64_t first, int64_t count, uint64_t key, uint32_t step, uint32_t stream);
    void (*philox)(const uint32_t* counter, const uint32_t* key, uint32_t* out);
    // The lower bounds that benchmarks compare with.
    void (*copy)(float* out, const float* in, int64_t count);
    void (*triad)(float* y, const float* const* x, int streams, float a, float s, int64_t first, int64_t count);
};

namespace scalar {
extern const Kernels kernels;
}
#if defined(FASTSAMPLE_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace fastsample
