// Linear layers with low-rank adapters on frozen, packed weights: y = x W^T + b + (x A^T * scale) B^T.
// Plain structs and pointers only: this header is compiled by every instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

namespace fastsample {

// A matrix (n, k) lies in panels of 32 of its rows ("columns" of the product), a last one of 16 where that is enough.
// In a panel k runs slowest: 32 neighbouring values for every k, of bfloat16 32 pairs for every two k. Missing columns
// and an odd k's partner are 0.
constexpr int kColumns = 32;
constexpr int kHalfPanel = 16;

inline int64_t padded_columns(int64_t n) { return (n + kHalfPanel - 1) / kHalfPanel * kHalfPanel; }
inline int64_t padded_depth(int64_t k, int dtype) { return dtype == kBFloat16 ? k + (k & 1) : k; }
inline int64_t packed_size(int64_t n, int64_t k, int dtype) { return padded_columns(n) * padded_depth(k, dtype); }
inline int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// A tile is up to kMostRows rows of x as 32-bit words, a float or a pair of bfloat16 each, cut along k into blocks of
// at most kDepth words a row. Rows lie a constant kPitch apart, so that the inner loop knows every address; it is no
// multiple of a page, where all rows would meet in the same cache set. A block's sum is formed in registers and then
// added to the others': that keeps the rounding of a long k small.
constexpr int kMostRows = 14;
constexpr int64_t kDepth = 192;
constexpr int64_t kPitch = kDepth + 16;
constexpr int64_t kBlockWords = kMostRows * kPitch;

// How many words lie in how many blocks of which (nearly equal, even) depth.
struct Words {
    int64_t all = 0, blocks = 0, each = 0;

    Words() = default;
    explicit Words(int64_t words) : all(words), blocks((words + kDepth - 1) / kDepth) {
        if (blocks > 0) each = ((words + blocks - 1) / blocks + 1) / 2 * 2;
    }
    int64_t in(int64_t first) const { return all - first < each ? all - first : each; }
};

struct LoraGroup {
    const void* down;     // (sum of ranks, K) packed: A of all linears
    const void* up;       // (N_i, ranks[i]) packed one after the other: B
    const float* scale;   // one per row of `down`
    const int64_t* ranks;
    int64_t total;        // sum of ranks
};

struct LoraArgs {
    const void* x;
    int64_t x_stride;  // elements from row to row
    int dtype;
    int64_t depth;        // K
    const void* weights;  // (N_i, K) packed one after the other
    int linears;
    const int64_t* columns;  // N_i
    const float* bias;       // (sum of N_i) or null
    const LoraGroup* groups;
    void* const* out;  // (rows, N_i)
};

// Rows of x that share a group.
struct LoraTile {
    int rows;
    int group;  // -1: none
    int64_t row[kMostRows];
};

// One arithmetic of one instruction set.
struct LoraKernels {
    int rows;  // most rows of a tile
    int64_t (*words)(int64_t k);  // of a row of k values
    // Packs a tile's rows of x into `scratch` and appends t = x A^T * scale of each linear; see lora_scratch_words.
    void (*prepare)(const LoraArgs* args, const LoraTile* tile, uint32_t* scratch);
    // Panels [begin, end), numbered through all linears, for `count` prepared tiles that lie `pitch` words apart.
    void (*multiply)(const LoraArgs* args, const LoraTile* tiles, int64_t count, const uint32_t* scratch, int64_t pitch,
                     int64_t begin, int64_t end);
    // What benchmarks compare with: `rounds` times 16 independent sums of register products; a round's FLOPs.
    float (*multiply_adds)(int64_t rounds);
    int flops;
};

inline int64_t panels_of(int64_t n) { return (n + kColumns - 1) / kColumns; }

namespace scalar {
extern const LoraKernels lora_float, lora_half, lora_bfloat;
}
#if defined(__x86_64__)
namespace avx2 {
extern const LoraKernels lora_float, lora_half, lora_bfloat;
}
namespace avx512 {
extern const LoraKernels lora_float, lora_half, lora_bfloat;
}
namespace avx512_bf16 {
extern const LoraKernels lora_bfloat;
}
#endif

// Rows to panels and back, bit for bit.
void lora_pack(const void* weight, int64_t n, int64_t k, int dtype, void* packed, int threads);
void lora_unpack(const void* packed, int64_t n, int64_t k, int dtype, void* weight, int threads);

// `samples` samples of `rows` rows of x each. group_of: of each sample, -1 none; null: group 0 for all, if there is one.
void lora_linear(const LoraArgs& args, int groups, int64_t samples, int64_t rows, const int64_t* group_of, int threads);

}  // namespace fastsample
