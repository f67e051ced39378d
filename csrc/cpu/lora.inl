// lora_linear's kernels, compiled once per instruction set as kernels.inl is: lora_<isa>.cpp includes this.

#include <stdint.h>
#include <string.h>
#if FASTSAMPLE_LANES > 1
#include <immintrin.h>
#endif

#include "lora.h"

#define FS_INLINE static inline FS_ALWAYS

namespace fastsample {
namespace FASTSAMPLE_ISA {

#include "lanes.h"
#include "lora_arithmetic.inl"
#include "lora_tile.inl"

// A row of `depth` values as words of a tile; `to` is its place in the first block.
template <class A>
FS_INLINE void pack_row(uint32_t* to, const char* row, int64_t depth) {
    const Words words(A::words(depth));
    for (int64_t first = 0; first < words.all; first += words.each, to += kBlockWords)
        A::pack(to, row, first, words.in(first), depth);
}

template <class A>
static void prepare(const LoraArgs* args, const LoraTile* tile, uint32_t* scratch) {
    const int64_t bytes = bytes_of(args->dtype), depth = args->depth;
    for (int r = 0; r < tile->rows; ++r)
        pack_row<A>(scratch + r * kPitch, (const char*)args->x + tile->row[r] * args->x_stride * bytes, depth);
    if (tile->group < 0) return;
    const LoraGroup& group = args->groups[tile->group];
    // t as rows first: a panel of A may hold columns of several linears.
    char* t = (char*)(scratch + group.rows);
    const int64_t row_bytes = padded_columns(group.total) * bytes;
    int64_t rows[kMostRows];
    for (int r = 0; r < kMostRows; ++r) rows[r] = r;
    for (int64_t column = 0; column < group.total; column += kColumns) {
        const int64_t left = group.total - column;
        const int width = left > kHalfPanel ? kColumns : kHalfPanel;
        float scale[kColumns] = {0};
        memcpy(scale, group.scale + column, (size_t)(left < width ? left : width) * 4);
        const Part base{scratch, (const char*)group.down + column * padded_depth(depth, args->dtype) * bytes,
                        Words(A::words(depth))};
        run_tile<A>(tile->rows, width, Product{{base, {}}, scale, nullptr, t + column * bytes, row_bytes, rows, width});
    }
    for (int i = 0; i < args->linears; ++i) {
        const LoraFactors& factors = group.linears[i];
        for (int r = 0; r < tile->rows; ++r)
            pack_row<A>(scratch + factors.t + r * kPitch, t + r * row_bytes, factors.rank);
        t += factors.rank * bytes;
    }
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
                if (tile.group >= 0) {
                    const LoraFactors& factors = args->groups[tile.group].linears[i];
                    const int64_t up_bytes = padded_depth(factors.rank, args->dtype) * bytes;
                    product.parts[1] = {words + factors.t, (const char*)factors.up + column * up_bytes, factors.words};
                }
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
    asm volatile("" : : "r"(&x), "r"(&w) : "memory");  // the compiler does not know them
    for (int64_t k = 0; k < rounds; ++k)
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) acc[i] = A::multiply_add(x, w, acc[i]);
    for (int i = 0; i < kSums; ++i) total = total + acc[i];
    return total[0];
}

template <class A>
constexpr LoraKernels lora_kernels() {
    return LoraKernels{kTileRows, A::words, prepare<A>, multiply<A>, multiply_adds<A>, kSums * 2 * kLanes * A::word_values};
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
