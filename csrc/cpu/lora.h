// Linear layers with low-rank adapters on frozen, packed weights: y = x W^T + b + (x A^T * scale) B^T.
// Plain structs and pointers only: this header is compiled by every instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

// Always inlined: one level's copy of these must not be linked into another's code.
#define FS_ALWAYS __attribute__((always_inline))

namespace fastsample {

// A layout is the DType of the weights, or one of these two: float32 as the sum of three bfloat16, float16 of two.
constexpr int kFloatParts = 3;
constexpr int kHalfParts = 4;
constexpr int kLayouts = 5;

FS_ALWAYS inline int dtype_of(int layout) {
    return layout == kFloatParts ? (int)kFloat32 : layout == kHalfParts ? (int)kFloat16 : layout;
}
FS_ALWAYS inline int64_t bytes_of(int layout) { return dtype_of(layout) == kFloat32 ? 4 : 2; }  // of a value outside
FS_ALWAYS inline int parts_of(int layout) { return layout == kFloatParts ? 3 : layout == kHalfParts ? 2 : 1; }
FS_ALWAYS inline int64_t packed_bytes(int layout) { return parts_of(layout) > 1 ? 2 * parts_of(layout) : bytes_of(layout); }

// A matrix (n, k) lies in panels of 32 of its rows ("columns" of the product), a last one of 16 where that is enough.
// In a panel k runs slowest: 32 neighbouring values for every k, of bfloat16 32 pairs for every two k. Missing columns
// and missing k, up to the 32 that a tile product takes of bfloat16, are 0. A panel of parts has, for every two k and
// every 16 columns, 16 pairs of each part, the largest part first; before all panels a header tells which of them hold
// values that need float arithmetic.
constexpr int kColumns = 32;
constexpr int kHalfPanel = 16;
constexpr int kTileDepth = 32;

FS_ALWAYS inline int64_t panels_of(int64_t n) { return (n + kColumns - 1) / kColumns; }
FS_ALWAYS inline int64_t padded_columns(int64_t n) { return (n + kHalfPanel - 1) / kHalfPanel * kHalfPanel; }
FS_ALWAYS inline int64_t padded_depth(int64_t k, int layout) {
    return layout == kFloat32 || layout == kFloat16 ? k : (k + kTileDepth - 1) / kTileDepth * kTileDepth;
}

// What a header of parts holds: how many panels are marked, and from byte kMarks on one mark a panel.
constexpr int64_t kMarks = 64;

FS_ALWAYS inline int64_t header_bytes(int64_t n, int layout) {
    return parts_of(layout) > 1 ? kMarks + (panels_of(n) + 63) / 64 * 64 : 0;
}
FS_ALWAYS inline bool is_marked(const void* packed, int64_t panel) { return ((const char*)packed)[kMarks + panel] != 0; }
FS_ALWAYS inline bool has_marks(const void* packed) { return *(const int64_t*)packed != 0; }

// Bytes before panel p of a packed matrix; before its end for p = panels_of(n).
FS_ALWAYS inline int64_t panel_offset(int64_t n, int64_t k, int layout, int64_t p) {
    const int64_t columns = p * kColumns < padded_columns(n) ? p * kColumns : padded_columns(n);
    return header_bytes(n, layout) + columns * padded_depth(k, layout) * packed_bytes(layout);
}
// In values of the dtype.
FS_ALWAYS inline int64_t packed_size(int64_t n, int64_t k, int layout) {
    return n == 0 || k == 0 ? 0 : panel_offset(n, k, layout, panels_of(n)) / bytes_of(layout);
}

// The vector kernels' tile is up to kVectorRows rows of x as 32-bit words, a float or a pair of bfloat16 each, cut along
// k into blocks of at most kDepth words a row. Rows lie a constant kPitch apart, so that the inner loop knows every
// address; it is no multiple of a page, where all rows would meet in the same cache set. A block's sum is formed in
// registers and then added to the others': that keeps the rounding of a long k small.
constexpr int kVectorRows = 14;
constexpr int64_t kDepth = 192;
constexpr int64_t kPitch = kDepth + 16;
constexpr int64_t kBlockWords = kVectorRows * kPitch;

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
    int64_t t;  // where the rows of t begin in a prepared tile
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
    int layout;
    int products;         // of kFloatParts: how many products of parts to sum, 6, 3 or 1
    int64_t depth;        // K
    const void* weights;  // (N_i, K) packed one after the other
    int linears;
    const int64_t* columns;  // N_i
    const float* bias;       // (sum of N_i) or null
    const LoraGroup* groups;
    void* const* out;  // (rows, N_i)
};

// Tiles that share one reading of the weights: at most so many, and no more than fit where x shall stay, but one.
FS_ALWAYS inline int64_t tiles_in_block(int64_t fitting, int64_t most) {
    return fitting < 1 ? 1 : fitting < most ? fitting : most;
}

// Rows of x that share a group.
constexpr int kMostRows = 32;

struct LoraTile {
    int rows;
    int group;  // -1: none
    int64_t row[kMostRows];
};

// One arithmetic of one instruction set.
struct LoraKernels {
    int rows;  // most rows of a tile
    int unit;  // a tile costs as much as one whose height is the next multiple of this
    int64_t (*words)(int64_t k);  // of scratch for a tile whose rows have k values
    int64_t (*block)(int64_t k);  // how many prepared tiles share one reading of the weights
    // Packs a tile's rows of x into `scratch` and puts t = x A^T * scale of each linear behind them.
    void (*prepare)(const LoraArgs* args, const LoraTile* tile, uint32_t* scratch);
    // Panels [begin, end), numbered through all linears, for `count` prepared tiles that lie `pitch` words apart.
    void (*multiply)(const LoraArgs* args, const LoraTile* tiles, int64_t count, const uint32_t* scratch, int64_t pitch,
                     int64_t begin, int64_t end);
    // Panels [begin, end) of a matrix of parts from its rows, marks included, and back; null for other layouts.
    void (*pack)(const void* rows, int64_t n, int64_t k, void* packed, int64_t begin, int64_t end);
    void (*unpack)(const void* packed, int64_t n, int64_t k, void* rows, int64_t begin, int64_t end);
    // What benchmarks compare with: `rounds` times independent sums of register products; a round's FLOPs.
    float (*multiply_adds)(int64_t rounds);
    int flops;
};

namespace scalar {
extern const LoraKernels lora_float, lora_half, lora_bfloat;
}
#if defined(FASTSAMPLE_X86)
namespace avx2 {
extern const LoraKernels lora_float, lora_half, lora_bfloat;
}
namespace avx512 {
extern const LoraKernels lora_float, lora_half, lora_bfloat;
}
namespace avx512_bf16 {
extern const LoraKernels lora_bfloat;
}
namespace amx {
extern const LoraKernels lora_float_parts, lora_half_parts, lora_bfloat;
}
#endif

}  // namespace fastsample
