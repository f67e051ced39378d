// lora_linear's kernels, compiled once per instruction set as kernels.inl is: lora_<isa>.cpp includes this.

#include <stdint.h>
#include <string.h>
#if FASTSAMPLE_LANES > 1
#include <immintrin.h>
#endif

#include "lora.h"

#define FS_ALWAYS __attribute__((always_inline))
#define FS_INLINE static inline FS_ALWAYS

namespace fastsample {
namespace FASTSAMPLE_ISA {

#include "lanes.h"
#include "lora_arithmetic.inl"
#include "lora_tile.inl"

// Words [first, first + count) of k of a tile's rows of x lie in block first / depth.
template <class A>
static void pack_rows(const LoraArgs* args, const LoraTile* tile, uint32_t* scratch) {
    const Words words(A::words(args->depth));
    for (int r = 0; r < tile->rows; ++r) {
        const char* row = (const char*)args->x + tile->row[r] * args->x_stride * bytes_of(args->dtype);
        for (int64_t block = 0, first = 0; block < words.blocks; ++block, first += words.each)
            A::pack(scratch + block * kBlockWords + r * kPitch, row, first, words.in(first), args->depth);
    }
}

template <class A>
static void prepare(const LoraArgs* args, const LoraTile* tile, uint32_t* scratch) {
    pack_rows<A>(args, tile, scratch);
    if (tile->group < 0) return;
    const LoraGroup& group = args->groups[tile->group];
    const Words depth(A::words(args->depth));
    const char* panel = (const char*)group.down;
    for (int64_t column = 0; column < group.total;) {
        const int width = group.total - column > kHalfPanel ? kColumns : kHalfPanel;
        float t[kMostRows * kColumns];
        run_tile<A>(tile->rows, width, Product{{{scratch, panel, depth}, {}}, t, nullptr, nullptr, 0, nullptr, 0});
        // To the blocks of the linears whose ranks these columns are.
        uint32_t* to = scratch + depth.blocks * kBlockWords;
        int64_t first = 0;
        for (int i = 0; i < args->linears; ++i) {
            const int64_t rank = group.ranks[i];
            const Words words(A::words(rank));
            const int64_t begin = first > column ? first : column;
            const int64_t end = first + rank < column + width ? first + rank : column + width;
            for (int r = 0; begin < end && r < tile->rows; ++r)
                A::put(to + r * kPitch, words.each, t + r * kColumns + (begin - column), group.scale + begin,
                       begin - first, end - begin, rank);
            first += rank;
            to += words.blocks * kBlockWords;
        }
        panel += (int64_t)width * padded_depth(args->depth, args->dtype) * bytes_of(args->dtype);
        column += width;
    }
}

// The low-rank part of linear i: where t lies in a tile and B among a group's factors.
template <class A>
FS_INLINE Part low_rank(const LoraArgs* args, const LoraGroup& group, int i, int64_t column, const uint32_t* t) {
    const char* up = (const char*)group.up;
    for (int j = 0; j < i; ++j) {
        up += packed_size(args->columns[j], group.ranks[j], args->dtype) * bytes_of(args->dtype);
        t += Words(A::words(group.ranks[j])).blocks * kBlockWords;
    }
    up += column * padded_depth(group.ranks[i], args->dtype) * bytes_of(args->dtype);
    return Part{t, up, Words(A::words(group.ranks[i]))};
}

template <class A>
static void multiply(const LoraArgs* args, const LoraTile* tiles, int64_t count, const uint32_t* scratch, int64_t pitch,
                     int64_t begin, int64_t end) {
    const int64_t bytes = bytes_of(args->dtype), column_bytes = padded_depth(args->depth, args->dtype) * bytes;
    const Words depth(A::words(args->depth));
    const char* weights = (const char*)args->weights;
    const float* bias = args->bias;
    int64_t first_panel = 0;
    for (int i = 0; i < args->linears; ++i) {
        const int64_t n = args->columns[i], panels = panels_of(n);
        const int64_t from = begin > first_panel ? begin - first_panel : 0;
        const int64_t to = end - first_panel < panels ? end - first_panel : panels;
        for (int64_t p = from; p < to; ++p) {
            const int64_t column = p * kColumns;
            const int width = n - column > kHalfPanel ? kColumns : kHalfPanel;
            const int valid = n - column < width ? (int)(n - column) : width;
            float panel_bias[kColumns] = {0};
            if (bias) memcpy(panel_bias, bias + column, (size_t)valid * 4);
            for (int64_t k = 0; k < count; ++k) {
                const LoraTile& tile = tiles[k];
                const uint32_t* words = scratch + k * pitch;
                Product product{{{words, weights + column * column_bytes, depth}, {}},
                                nullptr,
                                panel_bias,
                                (char*)args->out[i] + column * bytes,
                                n * bytes,
                                tile.row,
                                valid};
                if (tile.group >= 0)
                    product.parts[1] =
                        low_rank<A>(args, args->groups[tile.group], i, column, words + depth.blocks * kBlockWords);
                run_tile<A>(tile.rows, width, product);
            }
        }
        first_panel += panels;
        weights += padded_columns(n) * column_bytes;
        if (bias) bias += n;
    }
}

template <class A>
static float multiply_adds(int64_t rounds) {
    Lanes acc[kSums], total = {};
    for (int i = 0; i < kSums; ++i) acc[i] = spread((float)i);
    Lanes x = spread(1e-30f), w = spread(0.5f);
    asm volatile("" : "+x"(x), "+x"(w));  // not known to the compiler
    for (int64_t k = 0; k < rounds; ++k)
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) acc[i] = A::multiply_add(x, w, acc[i]);
    for (int i = 0; i < kSums; ++i) total = total + acc[i];
    return total[0];
}

template <class A>
constexpr LoraKernels lora_kernels() {
    return LoraKernels{kTileRows,   A::pairs, prepare<A>, multiply<A>, multiply_adds<A>,
                       kSums * 2 * kLanes * (A::pairs ? 2 : 1)};
}

#ifdef FASTSAMPLE_BF16
const LoraKernels lora_bfloat = lora_kernels<BfloatPairs>();
#else
const LoraKernels lora_float = lora_kernels<FloatWords<false>>();
const LoraKernels lora_half = lora_kernels<FloatWords<true>>();
const LoraKernels lora_bfloat = lora_kernels<BfloatAsFloat>();
#endif

}  // namespace FASTSAMPLE_ISA
}  // namespace fastsample
