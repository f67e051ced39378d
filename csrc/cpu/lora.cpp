#include "lora.h"

#include <string.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "memory.h"
#include "threads.h"

namespace fastsample {
namespace {

struct PackJob {
    const void* from;
    void* to;
    int64_t n, k;
    int dtype;
};

// copy(place among the rows, place in the panels) of every value in panels [begin, end).
template <class Copy>
void each_value(const PackJob& job, int64_t begin, int64_t end, Copy copy) {
    for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kColumns, panel = first * padded_depth(job.k, job.dtype);
        const int64_t width = std::min<int64_t>(kColumns, padded_columns(job.n) - first);
        const int64_t columns = std::min(width, job.n - first);
        for (int64_t k = 0; k < job.k; ++k)
            for (int64_t c = 0; c < columns; ++c)
                copy((first + c) * job.k + k,
                     panel + (job.dtype == kBFloat16 ? k / 2 * 2 * width + 2 * c + k % 2 : k * width + c));
    }
}

template <class T, bool Packs>
void copy_panels(const void* context, int64_t begin, int64_t end) {
    const PackJob& job = *static_cast<const PackJob*>(context);
    const T* from = static_cast<const T*>(job.from);
    T* to = static_cast<T*>(job.to);
    each_value(job, begin, end, [=](int64_t row, int64_t panel) {
        if (Packs) {
            to[panel] = from[row];
        } else {
            to[row] = from[panel];
        }
    });
}

// Memory that a thread keeps for its next calls, in huge pages where the system has them: tiles are spread over many
// small ones.
uint32_t* scratch(int64_t words) {
    constexpr int64_t kPage = 2 << 20, kPageWords = kPage / 4;
    thread_local std::unique_ptr<uint32_t[]> memory;
    thread_local int64_t size = 0;
    if (words > size) {
        memory.reset();
        size = (words + kPageWords - 1) / kPageWords * kPageWords;
        memory.reset(new uint32_t[size + kPageWords]);
        advise_huge_pages(memory.get(), (size + kPageWords) * 4);
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return reinterpret_cast<uint32_t*>((address + kPage - 1) & ~uintptr_t{kPage - 1});
}

// Rows of one group after the other, cut into tiles of nearly equal height.
std::vector<LoraTile> tiles_of(int64_t samples, int64_t rows, const int64_t* group_of, int groups, int most) {
    std::vector<LoraTile> tiles;
    std::vector<int64_t> members;
    for (int group = group_of ? -1 : 0; group < (group_of ? groups : 1); ++group) {
        members.clear();
        for (int64_t sample = 0; sample < samples; ++sample)
            if (!group_of || group_of[sample] == group) members.push_back(sample);
        const int64_t total = static_cast<int64_t>(members.size()) * rows;
        const int64_t count = (total + most - 1) / most;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t begin = total * i / count, end = total * (i + 1) / count;
            LoraTile tile{static_cast<int>(end - begin), group < groups ? group : -1, {}};
            for (int64_t row = begin; row < end; ++row)
                tile.row[row - begin] = members[static_cast<size_t>(row / rows)] * rows + row % rows;
            tiles.push_back(tile);
        }
    }
    return tiles;
}

// Rows that share one reading of the weights: enough to pay for it, and few enough to stay in the second-level cache.
constexpr int64_t kBlockRows = 112;
constexpr int64_t kCacheWords = 192 << 10;

struct Job {
    const LoraArgs* args;
    const LoraKernels* kernels;
    const std::vector<LoraTile>* tiles;
    int64_t tile_words, block, panels;
    uint32_t* shared;

    // Rows of x in blocks that stay in the second-level cache.
    void rows(int64_t begin, int64_t end) const {
        uint32_t* words = scratch(std::min(block, end - begin) * tile_words);
        for (int64_t first = begin; first < end; first += block) {
            const int64_t count = std::min(block, end - first);
            prepare(first, first + count, words);
            kernels->multiply(args, tiles->data() + first, count, words, tile_words, 0, panels);
        }
    }
    void prepare(int64_t begin, int64_t end, uint32_t* words) const {
        for (int64_t k = begin; k < end; ++k) kernels->prepare(args, tiles->data() + k, words + (k - begin) * tile_words);
    }
    void columns(int64_t begin, int64_t end) const {
        const int64_t all = static_cast<int64_t>(tiles->size());
        for (int64_t first = 0; first < all; first += block)
            kernels->multiply(args, tiles->data() + first, std::min(block, all - first), shared + first * tile_words,
                              tile_words, begin, end);
    }
};

int64_t share(int64_t units, int threads) { return (units + threads - 1) / threads; }

}  // namespace

void lora_pack(const void* weight, int64_t n, int64_t k, int dtype, void* packed, int threads) {
    const PackJob job{weight, packed, n, k, dtype};
    memset(packed, 0, static_cast<size_t>(packed_size(n, k, dtype) * bytes_of(dtype)));
    parallel(panels_of(n), threads, dtype == kFloat32 ? copy_panels<uint32_t, true> : copy_panels<uint16_t, true>, &job);
}

void lora_unpack(const void* packed, int64_t n, int64_t k, int dtype, void* weight, int threads) {
    const PackJob job{packed, weight, n, k, dtype};
    parallel(panels_of(n), threads, dtype == kFloat32 ? copy_panels<uint32_t, false> : copy_panels<uint16_t, false>, &job);
}

void lora_linear(const LoraArgs& args, int groups, int64_t samples, int64_t rows, const int64_t* group_of, int threads) {
    const LoraKernels& kernels = lora_kernels(args.dtype);
    for (int64_t sample = 0; group_of && sample < samples; ++sample)
        if (group_of[sample] < -1 || group_of[sample] >= groups)
            throw std::out_of_range("adapter_index[" + std::to_string(sample) + "] is " +
                                    std::to_string(group_of[sample]) + ": there are " + std::to_string(groups) +
                                    " groups of adapters, and -1 is none");
    const std::vector<LoraTile> tiles = tiles_of(samples, rows, group_of, groups, kernels.rows);
    if (tiles.empty()) return;
    int64_t low_rank_words = 0, panels = 0;
    for (int g = 0; g < groups; ++g) {
        const LoraGroup& group = args.groups[g];
        int64_t words = kMostRows * padded_columns(group.total);
        for (int i = 0; i < args.linears; ++i) words += Words(kernels.words(group.ranks[i])).blocks * kBlockWords;
        low_rank_words = std::max(low_rank_words, words);
    }
    for (int i = 0; i < args.linears; ++i) panels += panels_of(args.columns[i]);
    const int64_t count = static_cast<int64_t>(tiles.size());
    Job job{&args,
            &kernels,
            &tiles,
            Words(kernels.words(args.depth)).blocks * kBlockWords + low_rank_words,
            std::max<int64_t>(1, std::min(kBlockRows, kCacheWords / kernels.words(args.depth)) / kernels.rows),
            panels,
            nullptr};
    const auto by_rows = share(count, threads) * panels, by_columns = share(panels, threads) * count;
    if (by_rows <= by_columns) {
        parallel(count, threads,
                 [](const void* job, int64_t begin, int64_t end) { static_cast<const Job*>(job)->rows(begin, end); }, &job);
        return;
    }
    job.shared = scratch(count * job.tile_words);
    parallel(count, threads,
             [](const void* context, int64_t begin, int64_t end) {
                 const Job& job = *static_cast<const Job*>(context);
                 job.prepare(begin, end, job.shared + begin * job.tile_words);
             },
             &job);
    parallel(panels, threads,
             [](const void* job, int64_t begin, int64_t end) { static_cast<const Job*>(job)->columns(begin, end); }, &job);
}

}  // namespace fastsample
