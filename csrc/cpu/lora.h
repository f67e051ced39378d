// Linear layers with low-rank adapters on frozen, packed weights: y = x W^T + b + (x A^T * scale) B^T.
// Plain structs and pointers only: this header is compiled by every instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

// Always inlined: one level's copy of these must not be linked into another's code.
#define FS_ALWAYS __attribute__((always_inline))

namespace fastsample {

// A matrix (n, k) lies in panels of 32 of its rows ("columns" of the product), a last one of 16 where that is enough.
// In a panel k runs slowest: 32 neighbouring values for every k, of bfloat16 32 pairs for every two k. Missing columns
// and an odd k's partner are 0.
constexpr int kColumns = 32;
constexpr int kHalfPanel = 16;

FS_ALWAYS inline int64_t padded_columns(int64_t n) { return (n + kHalfPanel - 1) / kHalfPanel * kHalfPanel; }
FS_ALWAYS inline int64_t padded_depth(int64_t k, int dtype) { return dtype == kBFloat16 ? k + (k & 1) : k; }
FS_ALWAYS inline int64_t packed_size(int64_t n, int64_t k, int dtype) { return padded_columns(n) * padded_depth(k, dtype); }
FS_ALWAYS inline int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

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

    FS_ALWAYS Words() {}
    FS_ALWAYS explicit Words(int64_t words) : all(words), blocks((words + kDepth - 1) / kDepth) {
        if (blocks > 0) each = ((words + blocks - 1) / blocks + 1) / 2 * 2;
    }
    FS_ALWAYS int64_t in(int64_t first) const { return all - first < each ? all - first : each; }
    FS_ALWAYS int64_t size() const { return blocks * kBlockWords; }  // of a tile
};

// What a group of adapters adds to one linear.
struct LoraFactors {
    const void* up;  // (N_i, rank) packed: B
    int64_t rank;
    Words words;  // of a row of t
    int64_t t;    // where they begin in a prepared tile
};

struct LoraGroup {
    const void* down;    // (total, K) packed: A of all linears
    const float* scale;  // one per row of `down`
    int64_t total;       // sum of ranks
    const LoraFactors* linears;
    int64_t rows;  // where the rows of t lie in a prepared tile, behind all blocks
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
    // Packs a tile's rows of x into `scratch` and puts t = x A^T * scale of each linear behind them.
    void (*prepare)(const LoraArgs* args, const LoraTile* tile, uint32_t* scratch);
    // Panels [begin, end), numbered through all linears, for `count` prepared tiles that lie `pitch` words apart.
    void (*multiply)(const LoraArgs* args, const LoraTile* tiles, int64_t count, const uint32_t* scratch, int64_t pitch,
                     int64_t begin, int64_t end);
    // What benchmarks compare with: `rounds` times 16 independent sums of register products; a round's FLOPs.
    float (*multiply_adds)(int64_t rounds);
    int flops;
};

FS_ALWAYS inline int64_t panels_of(int64_t n) { return (n + kColumns - 1) / kColumns; }

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

}  // namespace fastsample
