// Every CPU kernel, compiled once per instruction set: kernels_<isa>.cpp names it, tells how many lanes it has and includes
// this.
// Only C headers, no std templates, internal linkage: nothing compiled here can be picked up by another level.

#include <stdint.h>
#include <string.h>
#if FASTSAMPLE_LANES > 1
#include <immintrin.h>
#endif

#include "kernels.h"

#define FS_ALWAYS __attribute__((always_inline))
#define FS_INLINE static inline FS_ALWAYS

namespace fastsample {
namespace FASTSAMPLE_ISA {

#include "lanes.h"
#include "../common/philox.h"
#include "../common/normal.h"
#include "../common/exp2.h"
#include "../common/step.h"

// op(i, count) for i = 0, W, 2W, ...; count is W (a constant once inlined) but for a last, partial vector.
template <class Op>
FS_INLINE void each_vector(int64_t n, Op op) {
    int64_t i = 0;
    for (; i + W <= n; i += W) op(i, (int64_t)W);
    if (i < n) op(i, n - i);
}

// Two whole vectors at a time, pair(i) for i and i + W; what is left, less than two, is op's.
template <class PairOp, class Op>
FS_INLINE void each_pair(int64_t n, PairOp pair, Op op) {
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) pair(i);
    for (; i < n; i += W) op(i, n - i < W ? n - i : (int64_t)W);
}

FS_INLINE F load(const float* p, int64_t count) { return count == W ? load(p) : load_part(p, count); }
FS_INLINE void store(float* p, F v, int64_t count) { count == W ? store(p, v) : store_part(p, v, count); }

#include "convert.inl"
#include "noise.inl"
#include "sums.inl"
#include "log_prob.inl"
#include "step.inl"
#include "reductions.inl"
#include "bend.inl"
#include "streams.inl"

const Kernels kernels = {step, rescale_factor, threshold, bend_sums, bend, normals, philox_words, copy, triad};

}  // namespace FASTSAMPLE_ISA
}  // namespace fastsample
