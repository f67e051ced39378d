// The bound of dynamic thresholding, what fastsample/ops/step/reductions.py specifies: clamp(quantile of |x0|, 1, limit) of each
// sample, as ../cpu/reductions.inl finds it and with the same bits. |x0| is written once and read three times; its bits
// order like its values, and three passes find the value of the wanted rank by their digits, of 11, 10 and 10 bits:
// each counts a digit among the values that begin with the digits found so far. Counts are integers, so their order
// does not matter.
#include "common.h"

namespace fastsample {
namespace cuda {
namespace {

#include "reductions.h"

struct ThresholdArgs : DeviceStepArgs {
    Selection* selections;
    float *sizes, *to;
};

constexpr uint32_t kInfinity = 0x7f800000u;

// A digit's place among the bits, and its counts' among those of a Selection.
struct Digit {
    int shift, bits, counts;
};
template <int kDigit>
FS_INLINE Digit digit() {
    return kDigit == 0 ? Digit{20, 11, 0} : kDigit == 1 ? Digit{10, 10, 2048} : Digit{0, 10, 3072};
}

// The wanted rank as torch.quantile computes it: `lower`, and how far from there to the next value.
struct Rank {
    int64_t lower;
    float weight;
};
FS_INLINE Rank rank_of(float quantile, int64_t n) {
    const float rank = quantile * (float)(n - 1);
    const int64_t lower = (int64_t)rank < n ? (int64_t)rank : n - 1;
    return {lower, rank - (float)lower};
}

__global__ void __launch_bounds__(kReduceThreads, kReduceBlocks) clear_kernel(const ThresholdArgs args) {
    const int64_t sample = blockIdx.x;
    Selection& selection = args.selections[sample];
    for (int i = threadIdx.x; i < 4096; i += kReduceThreads) selection.counts[i] = 0;
    if (threadIdx.x == 0) {
        selection.next = kInfinity;
        selection.has_nan = 0;
    }
}

// Of the block's values, to the sample's.
template <int kDigit>
FS_INLINE void add_counts(const unsigned* counts, Selection* selection) {
    const Digit d = digit<kDigit>();
    for (int i = threadIdx.x; i < 1 << d.bits; i += kReduceThreads)
        if (counts[i]) atomicAdd(&selection->counts[d.counts + i], (unsigned long long)counts[i]);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kReduceThreads, kReduceBlocks) sizes_kernel(const ThresholdArgs args) {
    __shared__ unsigned counts[2048];
    const int64_t sample = sample_of_block();
    if (sample >= args.batch) return;
    const Row row = load_row(args, row_number(args, sample));
    if (!(row.quantile > 0.0f)) return;
    for (int i = threadIdx.x; i < 2048; i += kReduceThreads) counts[i] = 0;
    __syncthreads();
    const float q = times_factor(row.q, args.factors ? args.factors[sample] : 1.0f);
    bool has_nan = false;
    each_eight(args.size, [&](int64_t first, int count) {
        const int64_t at = sample * args.size + first;
        F x[kWhole], m[kWhole], conditional[kWhole], sizes[kWhole];
        load_eight<kAligned>(args.x + at, count, x);
        load_output_eight<T, kAligned>(args, sample, first, count, m, conditional);
        for (int i = 0; i < kWhole; ++i) {
            const U bits = as_bits(estimate(row.p, q, x[i], m[i])) & 0x7fffffffu;
            sizes[i] = as_float(bits);
            if (i < count) {
                has_nan = has_nan || bits > kInfinity;
                atomicAdd(&counts[bits >> digit<0>().shift], 1u);
            }
        }
        store_eight<kAligned>(args.sizes + at, count, sizes);
    });
    Selection* const selection = args.selections + sample;
    if (has_nan) atomicOr(&selection->has_nan, 1u);
    __syncthreads();
    add_counts<0>(counts, selection);
}

// The digit that holds the wanted rank: every block finds it from the counts, and the first one notes it for later
// passes. `below` counts the values below `prefix`, which becomes the digits found so far.
template <int kDigit>
FS_INLINE void pick(Selection* selection, int64_t rank, uint32_t* prefix, int64_t* below, int64_t* through) {
    __shared__ unsigned long long totals[kReduceThreads];
    __shared__ unsigned long long found[3];
    const Digit d = digit<kDigit>();
    *prefix = kDigit ? selection->prefix[kDigit ? kDigit - 1 : 0] : 0;
    *below = kDigit ? selection->below[kDigit ? kDigit - 1 : 0] : 0;
    const unsigned long long wanted = (unsigned long long)(rank - *below);
    const int own = (1 << d.bits) / kReduceThreads, first = (int)threadIdx.x * own;
    const unsigned long long* const counts = selection->counts + d.counts + first;
    unsigned long long sum = 0;
    for (int i = 0; i < own; ++i) sum += counts[i];
    totals[threadIdx.x] = sum;
    __syncthreads();
    for (int distance = 1; distance < kReduceThreads; distance *= 2) {
        const unsigned long long before = (int)threadIdx.x >= distance ? totals[threadIdx.x - distance] : 0;
        __syncthreads();
        totals[threadIdx.x] += before;
        __syncthreads();
    }
    unsigned long long before = totals[threadIdx.x] - sum;
    if (before <= wanted && wanted < before + sum) {
        int bucket = 0;
        while (before + counts[bucket] <= wanted) before += counts[bucket++];
        found[0] = (unsigned long long)(first + bucket);
        found[1] = before;
        found[2] = before + counts[bucket];
    }
    __syncthreads();
    *prefix = *prefix << d.bits | (uint32_t)found[0];
    *through = *below + (int64_t)found[2];
    *below += (int64_t)found[1];
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        selection->prefix[kDigit] = *prefix;
        selection->below[kDigit] = *below;
        selection->through = *through;
    }
}

// Counts digit kDigit, after picking the one before it.
template <int kDigit, bool kAligned>
__global__ void __launch_bounds__(kReduceThreads, kReduceBlocks) count_kernel(const ThresholdArgs args) {
    __shared__ unsigned counts[1024];
    const int64_t sample = sample_of_block();
    if (sample >= args.batch) return;
    const float quantile = load_row(args, row_number(args, sample)).quantile;
    if (!(quantile > 0.0f)) return;
    Selection* const selection = args.selections + sample;
    for (int i = threadIdx.x; i < 1024; i += kReduceThreads) counts[i] = 0;
    uint32_t prefix;
    int64_t below, through;
    pick<kDigit - 1>(selection, rank_of(quantile, args.size).lower, &prefix, &below, &through);
    each_eight(args.size, [&](int64_t first, int count) {
        F sizes[kWhole];
        load_eight<kAligned>(args.sizes + sample * args.size + first, count, sizes);
        for (int i = 0; i < kWhole; ++i) {
            const U bits = as_bits(sizes[i]);
            if (i < count && bits >> digit<kDigit - 1>().shift == prefix)
                atomicAdd(&counts[bits >> digit<kDigit>().shift & 1023u], 1u);
        }
    });
    __syncthreads();
    add_counts<kDigit>(counts, selection);
}

// After picking the last digit: the smallest value above it, where that is asked for.
template <bool kAligned>
__global__ void __launch_bounds__(kReduceThreads, kReduceBlocks) next_kernel(const ThresholdArgs args) {
    const int64_t sample = sample_of_block();
    if (sample >= args.batch) return;
    const float quantile = load_row(args, row_number(args, sample)).quantile;
    if (!(quantile > 0.0f)) return;
    Selection* const selection = args.selections + sample;
    const Rank rank = rank_of(quantile, args.size);
    uint32_t low;
    int64_t below, through;
    pick<2>(selection, rank.lower, &low, &below, &through);
    if (!(rank.weight > 0.0f) || through > rank.lower + 1) return;
    uint32_t next = kInfinity;
    each_eight(args.size, [&](int64_t first, int count) {
        F sizes[kWhole];
        load_eight<kAligned>(args.sizes + sample * args.size + first, count, sizes);
        for (int i = 0; i < kWhole; ++i) {
            const U bits = as_bits(sizes[i]);
            if (i < count && bits > low && bits < next) next = bits;
        }
    });
    if (next < kInfinity) atomicMin(&selection->next, next);
}

// One thread a sample.
__global__ void __launch_bounds__(kReduceThreads, kReduceBlocks) bounds_kernel(const ThresholdArgs args) {
    const int64_t sample = (int64_t)blockIdx.x * kReduceThreads + threadIdx.x;
    if (sample >= args.batch) return;
    const Row row = load_row(args, row_number(args, sample));
    float bound = row.limit;
    if (row.quantile > 0.0f) {
        const Selection& selection = args.selections[sample];
        const Rank rank = rank_of(row.quantile, args.size);
        const bool moves = rank.weight > 0.0f && selection.through <= rank.lower + 1 && rank.lower + 1 < args.size;
        const float a = as_float(selection.prefix[2]), b = moves ? as_float(selection.next) : a;
        const float between = rank.weight < 0.5f ? fma(rank.weight, b - a, a) : fma(rank.weight - 1.0f, b - a, b);
        const float bounded = between < 1.0f ? 1.0f : between;
        if (!(bounded > bound)) bound = bounded;
        if (selection.has_nan || !(bound < INFINITY)) bound = NAN;
    }
    args.to[sample] = bound;
}

template <class T>
void launch_sizes(const ThresholdArgs& args, const Shape& shape, cudaStream_t stream) {
    launch(all_whole(args) ? sizes_kernel<T, true> : sizes_kernel<T, false>, shape.grid, shape.block, args, stream);
}

}  // namespace

void thresholds(const DeviceStepArgs& step, Selection* selections, float* sizes, float* bounds, Stream to) {
    ThresholdArgs args = {};
    static_cast<DeviceStepArgs&>(args) = step;
    args.selections = selections;
    args.sizes = sizes;
    args.to = bounds;
    const cudaStream_t stream = static_cast<cudaStream_t>(to);
    const Shape shape = chunk_shape(args.batch, args.size);
    const bool good = args.size % kWhole == 0;
    launch(clear_kernel, dim3((unsigned)args.batch), shape.block, args, stream);
    if (args.m_dtype == kFloat16) launch_sizes<Half>(args, shape, stream);
    else if (args.m_dtype == kBFloat16) launch_sizes<Bfloat>(args, shape, stream);
    else launch_sizes<float>(args, shape, stream);
    launch(good ? count_kernel<1, true> : count_kernel<1, false>, shape.grid, shape.block, args, stream);
    launch(good ? count_kernel<2, true> : count_kernel<2, false>, shape.grid, shape.block, args, stream);
    launch(good ? next_kernel<true> : next_kernel<false>, shape.grid, shape.block, args, stream);
    const dim3 blocks((unsigned)((args.batch + kReduceThreads - 1) / kReduceThreads));
    launch(bounds_kernel, blocks, shape.block, args, stream);
}

}  // namespace cuda
}  // namespace fastsample
