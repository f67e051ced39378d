// What every instruction set provides. Plain structs and pointers only: this header is compiled by each of them.
#pragma once
#include <stdint.h>

namespace fastsample {

enum DType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// One row of fastsample.tables.Table.packed.
struct Row {
    float p, q, a, b, d, s, limit, folded_x, folded_m;
};

// One step over `batch` samples of `size` elements each. Absent operands are null.
struct StepArgs {
    const Row* row;
    int64_t batch, size;
    const float* x;
    const void* m;
    int64_t m_stride;  // elements from one sample of m to the next: size, or 2 * size where the variance half follows
    int m_dtype;
    const float* z;         // given noise, else
    const uint64_t* seeds;  // one per sample: noise drawn in the pass
    uint32_t noise_step;
    float* out;
    float* x0_out;
    void* input_out;
    int input_dtype;
};

// Blocks of one sample stay in L1: 2048 floats are 8 KiB a stream.
constexpr int64_t kBlock = 2048;

struct Kernels {
    // Work on blocks [begin, end), numbered through all samples; a sample has ceil(size / kBlock) of them.
    void (*step)(const StepArgs* args, int64_t begin, int64_t end);
    // Normals number [first, first + count) of one sample's stream; first is a multiple of 4.
    void (*normals)(float* out, int64_t first, int64_t count, uint64_t seed, uint32_t step, uint32_t stream);
    void (*philox)(const uint32_t* counter, const uint32_t* key, uint32_t* out);
    // The lower bounds that benchmarks compare with.
    void (*copy)(float* out, const float* in, int64_t count);
    void (*triad)(float* y, const float* x, float a, float s, int64_t count);
};

namespace scalar {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace fastsample
