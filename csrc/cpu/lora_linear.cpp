#include "lora_linear.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "memory.h"
#include "threads.h"

namespace fastsample {
namespace {

struct PackJob {
    const void* from;
    void* to;
    int64_t n, k;
    int layout;
    const LoraKernels* kernels;  // of parts; found before threads start, since an exception may not leave one
};

// copy(place among the rows, place in the panels) of every value in panels [begin, end).
template <class Copy>
void each_value(const PackJob& job, int64_t begin, int64_t end, Copy copy) {
    for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kColumns, panel = first * padded_depth(job.k, job.layout);
        const int64_t width = std::min<int64_t>(kColumns, padded_columns(job.n) - first);
        const int64_t columns = std::min(width, job.n - first);
        for (int64_t k = 0; k < job.k; ++k)
            for (int64_t c = 0; c < columns; ++c)
                copy((first + c) * job.k + k,
                     panel + (job.layout == kBFloat16 ? k / 2 * 2 * width + 2 * c + k % 2 : k * width + c));
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

// Memory that a calling thread keeps for its next calls, in huge pages where the system has them: tiles are spread over
// many small ones.
uint32_t* scratch(int64_t words) {
    constexpr int64_t kPage = 2 << 20, kPageWords = kPage / 4;
    thread_local std::unique_ptr<uint32_t[]> memory;
    thread_local int64_t size = 0;
    if (words > size) {
        const int64_t rounded = (words + kPageWords - 1) / kPageWords * kPageWords;
        memory.reset();
        size = 0;
        memory.reset(new uint32_t[rounded + kPageWords]);
        size = rounded;
        advise_huge_pages(memory.get(), (size + kPageWords) * 4);
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return reinterpret_cast<uint32_t*>((address + kPage - 1) & ~uintptr_t{kPage - 1});
}

// From so many tiles a thread on they are dealt out whole; below, where the last one would leave threads waiting, panels
// are.
constexpr int64_t kTilesPerThread = 8;

// Rows of one group after the other, cut into tiles of nearly equal height, in units of the kernels'.
std::vector<LoraTile> tiles_of(int64_t samples, int64_t rows, const int64_t* group_of, int groups,
                               const LoraKernels& kernels, int threads) {
    std::vector<LoraTile> tiles;
    std::vector<int64_t> members;
    for (int group = group_of ? -1 : 0; group < (group_of ? groups : 1); ++group) {
        members.clear();
        for (int64_t sample = 0; sample < samples; ++sample)
            if (!group_of || group_of[sample] == group) members.push_back(sample);
        const int64_t total = static_cast<int64_t>(members.size()) * rows;
        const int64_t units = (total + kernels.unit - 1) / kernels.unit;
        int64_t count = (total + kernels.rows - 1) / kernels.rows;
        if (count >= kTilesPerThread * threads) count = (count + threads - 1) / threads * threads;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t begin = units * i / count * kernels.unit;
            const int64_t end = std::min(total, units * (i + 1) / count * kernels.unit);
            if (begin >= end) continue;
            LoraTile tile{static_cast<int>(end - begin), group < groups ? group : -1, {}};
            for (int64_t row = begin; row < end; ++row)
                tile.row[row - begin] = members[static_cast<size_t>(row / rows)] * rows + row % rows;
            tiles.push_back(tile);
        }
    }
    return tiles;
}

// The groups as the kernels read them, and where in a tile of `words` words their parts lie, behind x's.
struct Groups {
    std::vector<LoraGroup> groups;
    std::vector<LoraFactors> factors;
    int64_t words;

    Groups(const LoraArgs& args, const std::vector<LoraAdapters>& adapters, const LoraKernels& kernels) {
        const int64_t first = kernels.words(args.depth);
        words = first;
        factors.reserve(adapters.size() * static_cast<size_t>(args.linears));
        for (const LoraAdapters& one : adapters) {
            LoraGroup group{one.down, one.scale, 0, factors.data() + factors.size(), first};
            const char* up = static_cast<const char*>(one.up);
            for (int i = 0; i < args.linears; ++i) {
                const int64_t rank = one.ranks[i];
                factors.push_back({up, rank, group.rows});
                group.rows += kernels.words(rank);
                group.total += rank;
                up += packed_size(args.columns[i], rank, args.layout) * bytes_of(args.layout);
            }
            words = std::max(words, group.rows + kMostRows * padded_columns(group.total));
            groups.push_back(group);
        }
    }
};

struct Job {
    const LoraArgs* args;
    const LoraKernels* kernels;
    const std::vector<LoraTile>* tiles;
    int64_t tile_words, block, panels;
    uint32_t* scratch;
    mutable std::atomic<int> thread{0};

    // Tiles [begin, end) with all panels, block by block.
    void rows(int64_t begin, int64_t end) const {
        uint32_t* words = scratch + thread.fetch_add(1) * block * tile_words;
        each_block(begin, end, [&](int64_t first, int64_t last) {
            prepare(first, last, words);
            kernels->multiply(args, tiles->data() + first, last - first, words, tile_words, 0, panels);
        });
    }
    void prepare(int64_t begin, int64_t end, uint32_t* words) const {
        for (int64_t k = begin; k < end; ++k) kernels->prepare(args, tiles->data() + k, words + (k - begin) * tile_words);
    }
    // All tiles, prepared before, with panels [begin, end).
    void columns(int64_t begin, int64_t end) const {
        each_block(0, static_cast<int64_t>(tiles->size()), [&](int64_t first, int64_t last) {
            kernels->multiply(args, tiles->data() + first, last - first, scratch + first * tile_words, tile_words, begin,
                              end);
        });
    }

private:
    // Blocks of nearly equal size: a small last one would read all weights for a few rows.
    template <class Body>
    void each_block(int64_t begin, int64_t end, Body body) const {
        const int64_t count = end - begin, blocks = (count + block - 1) / block;
        for (int64_t i = 0; i < blocks; ++i) body(begin + count * i / blocks, begin + count * (i + 1) / blocks);
    }
};

int64_t share(int64_t units, int threads) { return (units + threads - 1) / threads; }

// A second thread is worth waking for 5 to 10 us of work each.
constexpr int64_t kGrain = 400000;  // multiply-adds
constexpr int64_t kPackGrain = 16384;

void over_panels(const PackJob& job, int threads, void (*body)(const void*, int64_t, int64_t)) {
    parallel(panels_of(job.n), useful_threads(threads, job.n * job.k, kPackGrain), body, &job);
}

// Panels of parts, whose arithmetic is the kernels' own.
template <bool Packs>
void convert_panels(const void* context, int64_t begin, int64_t end) {
    const PackJob& job = *static_cast<const PackJob*>(context);
    (Packs ? job.kernels->pack : job.kernels->unpack)(job.from, job.n, job.k, job.to, begin, end);
}

void count_marks(void* packed, int64_t n) {
    int64_t marked = 0;
    for (int64_t p = 0; p < panels_of(n); ++p) marked += is_marked(packed, p);
    memcpy(packed, &marked, sizeof marked);
}

}  // namespace

void lora_pack(const void* weight, int64_t n, int64_t k, int layout, void* packed, int threads) {
    const int64_t size = packed_size(n, k, layout);
    if (size == 0) return;
    const PackJob job{weight, packed, n, k, layout, &lora_kernels(layout)};
    memset(packed, 0, static_cast<size_t>(size * bytes_of(layout)));
    if (parts_of(layout) > 1) {
        over_panels(job, threads, convert_panels<true>);
        count_marks(packed, n);
    } else {
        over_panels(job, threads, layout == kFloat32 ? copy_panels<uint32_t, true> : copy_panels<uint16_t, true>);
    }
}

void lora_unpack(const void* packed, int64_t n, int64_t k, int layout, void* weight, int threads) {
    const PackJob job{packed, weight, n, k, layout, &lora_kernels(layout)};
    const auto copy = layout == kFloat32 ? copy_panels<uint32_t, false> : copy_panels<uint16_t, false>;
    over_panels(job, threads, parts_of(layout) > 1 ? convert_panels<false> : copy);
}

void lora_linear(LoraArgs args, const std::vector<LoraAdapters>& adapters, int64_t samples, int64_t rows,
                 const int64_t* group_of, int threads) {
    const int count_of_groups = static_cast<int>(adapters.size());
    for (int64_t sample = 0; group_of && sample < samples; ++sample)
        if (group_of[sample] < -1 || group_of[sample] >= count_of_groups)
            throw std::out_of_range("adapter_index[" + std::to_string(sample) + "] is " +
                                    std::to_string(group_of[sample]) + ": there are " + std::to_string(count_of_groups) +
                                    " groups of adapters, and -1 is none");
    const LoraKernels& kernels = lora_kernels(args.layout);
    const Groups groups(args, adapters, kernels);
    args.groups = groups.groups.data();
    int64_t panels = 0, columns = 0;
    for (int i = 0; i < args.linears; ++i) {
        panels += panels_of(args.columns[i]);
        columns += args.columns[i];
    }
    threads = useful_threads(threads, samples * rows * args.depth * columns, kGrain);
    const std::vector<LoraTile> tiles = tiles_of(samples, rows, group_of, count_of_groups, kernels, threads);
    if (tiles.empty()) return;
    const int64_t count = static_cast<int64_t>(tiles.size());
    Job job{&args, &kernels, &tiles, groups.words, kernels.block(args.depth), panels, nullptr};
    if (count >= kTilesPerThread * threads || share(count, threads) * panels <= share(panels, threads) * count) {
        job.scratch = scratch(threads * job.block * job.tile_words);
        parallel(count, threads,
                 [](const void* job, int64_t begin, int64_t end) { static_cast<const Job*>(job)->rows(begin, end); }, &job);
        return;
    }
    job.scratch = scratch(count * job.tile_words);
    parallel(count, threads,
             [](const void* context, int64_t begin, int64_t end) {
                 const Job& job = *static_cast<const Job*>(context);
                 job.prepare(begin, end, job.scratch + begin * job.tile_words);
             },
             &job);
    parallel(panels, threads,
             [](const void* job, int64_t begin, int64_t end) { static_cast<const Job*>(job)->columns(begin, end); }, &job);
}

int64_t lora_multiply_adds(int64_t rounds, int dtype, int threads) {
    struct Peak {
        const LoraKernels* kernels;
        int64_t rounds;
    } const peak{&lora_kernels(dtype), rounds};
    parallel(threads, threads,
             [](const void* context, int64_t, int64_t) {
                 const Peak& peak = *static_cast<const Peak*>(context);
                 volatile float kept = peak.kernels->multiply_adds(peak.rounds);
                 (void)kept;
             },
             &peak);
    return rounds * threads * peak.kernels->flops;
}

}  // namespace fastsample
