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

// The columns of a panel, 32 or 16.
FS_INLINE int width_of(int64_t n, int64_t panel) { return n - panel * kColumns > kHalfPanel ? kColumns : kHalfPanel; }
FS_INLINE int valid_of(int64_t n, int64_t panel) {
    const int64_t left = n - panel * kColumns;
    return left < kColumns ? (int)left : kColumns;
}

// A panel's own floats out of those of all columns, zeros behind them.
struct PanelFloats {
    float values[kColumns] = {0};

    FS_ALWAYS PanelFloats(const float* all, int64_t n, int64_t panel) {
        if (all) memcpy(values, all + panel * kColumns, (size_t)valid_of(n, panel) * 4);
    }
};

// body(i, n, panel, packed weights, bias) of panels [begin, end), numbered through all linears.
template <class Body>
FS_INLINE void each_panel(const LoraArgs* args, int64_t begin, int64_t end, Body body) {
    const char* weights = (const char*)args->weights;
    const float* bias = args->bias;
    int64_t first = 0;
    for (int i = 0; i < args->linears; ++i) {
        const int64_t n = args->columns[i], panels = panels_of(n);
        const int64_t to = end - first < panels ? end - first : panels;
        for (int64_t p = begin > first ? begin - first : 0; p < to; ++p) body(i, n, p, weights, bias);
        first += panels;
        weights += panel_offset(n, args->depth, args->layout, panels);
        if (bias) bias += n;
    }
}

template <class A>
static void prepare(const LoraArgs* args, const LoraTile* tile, uint32_t* scratch) {
    const int64_t bytes = bytes_of(args->layout), depth = args->depth;
    for (int r = 0; r < tile->rows; ++r)
        pack_row<A>(scratch + r * kPitch, (const char*)args->x + tile->row[r] * args->x_stride * bytes, depth);
    if (tile->group < 0) return;
    const LoraGroup& group = args->groups[tile->group];
    // t as rows first: a panel of A may hold columns of several linears.
    char* t = (char*)(scratch + group.rows);
    const int64_t row_bytes = padded_columns(group.total) * bytes;
    int64_t rows[kVectorRows];
    for (int r = 0; r < kVectorRows; ++r) rows[r] = r;
    for (int64_t p = 0; p < panels_of(group.total); ++p) {
        const PanelFloats scale(group.scale, group.total, p);
        const char* panel = (const char*)group.down + panel_offset(group.total, depth, args->layout, p);
        const int width = width_of(group.total, p);
        run_tile<A>(tile->rows, Product{{{scratch, panel, Words(A::words(depth))}, {}},
                                        {scale.values, nullptr, t + p * kColumns * bytes, row_bytes, rows, width, width}});
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
    const int64_t bytes = bytes_of(args->layout);
    const Words depth(A::words(args->depth));
    each_panel(args, begin, end, [=](int i, int64_t n, int64_t p, const char* weights, const float* bias) FS_ALWAYS {
        const PanelFloats panel_bias(bias, n, p);
        const char* panel = weights + panel_offset(n, args->depth, args->layout, p);
        for (int64_t k = 0; k < count; ++k) {
            const LoraTile& tile = tiles[k];
            const uint32_t* words = scratch + k * pitch;
            Product product{{{words, panel, depth}, {}},
                            {nullptr, panel_bias.values, (char*)args->out[i] + p * kColumns * bytes, n * bytes, tile.row,
                             width_of(n, p), valid_of(n, p)}};
            if (tile.group >= 0) {
                const LoraFactors& factors = args->groups[tile.group].linears[i];
                const char* up = (const char*)factors.up + panel_offset(n, factors.rank, args->layout, p);
                product.parts[1] = {words + factors.t, up, Words(A::words(factors.rank))};
            }
            run_tile<A>(tile.rows, product);
        }
    });
}

template <class A>
static int64_t tile_words(int64_t k) {
    return Words(A::words(k)).size();
}

// Rows that share one reading of the weights are enough to pay for it, and few enough to stay in the second-level cache.
template <class A>
static int64_t tile_block(int64_t k) {
    constexpr int64_t most = 280 / kTileRows, cache_words = 208 << 10;
    return tiles_in_block(cache_words / tile_words<A>(k), most);
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
    return {kTileRows,   1,       tile_words<A>, tile_block<A>,    prepare<A>,
            multiply<A>, nullptr, nullptr,       multiply_adds<A>, kSums * 2 * kLanes * A::word_values};
}

#if defined(FASTSAMPLE_AMX)
#include "lora_parts.inl"
#include "lora_amx.inl"
#elif defined(FASTSAMPLE_BF16)
const LoraKernels lora_bfloat = lora_kernels<BfloatPairs>();
#else
const LoraKernels lora_float = lora_kernels<FloatWords<false>>();
const LoraKernels lora_half = lora_kernels<FloatWords<true>>();
const LoraKernels lora_bfloat = lora_kernels<BfloatAsFloat>();
#endif

}  // namespace FASTSAMPLE_ISA
}  // namespace fastsample
