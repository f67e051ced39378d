// Runs the threads of a launch: one ucontext fiber for each thread of a block that waits.
#include "cuda_on_cpu.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

// There where the address sanitizer runs, which must know of stacks that are switched.
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size) __attribute__((weak));
}

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 64 << 10, kPage = 4096;
constexpr uint64_t kMostBlocks = 1 << 24;  // an hour of tests otherwise

// ucontext makes a stack; the compiler's own jumps switch to it from then on, without swapcontext's system call and without
// setjmp's hook in the address sanitizer.
struct Context {
    void* place[5];
    void* bottom = nullptr;
    size_t size = 0;
};

struct Fiber : Context {
    ucontext_t start;
    bool started = false;
    unsigned thread;
};

struct Thread {
    Fiber* fiber;
    uint3 index;
    bool waits, returned;
    Site site;
    uint64_t value, lanes[warpSize];
};

struct Range {
    void* first;
    size_t bytes;
};

struct Launch {
    const void* kernel;
    dim3 grid, block;
};

// Settings and what was seen, by the C functions below.
uint64_t first_block = 0, last_block = UINT64_MAX;
int order = 0;
std::vector<Range> shared_memory;
std::vector<Launch> launches;

std::mutex one_launch;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
std::vector<Thread> threads;
unsigned next_thread;
Context scheduler;
Fiber* running;
void (*thread_body)(const void*);
const void* thread_context;
std::string failure;

void start_switch(void** fake_stack, const Context& to) {
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(fake_stack, to.bottom, to.size);
}

void finish_switch(void* fake_stack, Context* from) {
    const void* bottom = nullptr;
    size_t size = 0;
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
    if (!from) return;
    from->bottom = const_cast<void*>(bottom);
    from->size = size;
}

void to_scheduler() {
    void* fake_stack = nullptr;
    start_switch(&fake_stack, scheduler);
    if (!__builtin_setjmp(running->place)) __builtin_longjmp(scheduler.place, 1);
    finish_switch(fake_stack, nullptr);
}

void resume(Fiber* fiber) {
    void* fake_stack = nullptr;
    running = fiber;
    start_switch(&fake_stack, *fiber);
    if (!__builtin_setjmp(scheduler.place)) {
        if (running->started) __builtin_longjmp(running->place, 1);
        running->started = true;
        setcontext(&running->start);
    }
    finish_switch(fake_stack, nullptr);
}

// Ascending, descending, or far from both: results must not depend on it, nor hide that a barrier is missing.
uint64_t permuted(uint64_t k, uint64_t count) {
    if (order == 1) return count - 1 - k;
    if (order == 0) return k;
    uint64_t stride = count * 5 / 8 + 1;
    while (std::gcd(stride, count) != 1) ++stride;
    return (k * stride + count / 3) % count;
}

// Takes up one thread after the other; one that waits keeps the fiber, and the scheduler gets another.
void fiber_main() {
    finish_switch(nullptr, &scheduler);
    for (;;) {
        while (next_thread < threads.size()) {
            running->thread = static_cast<unsigned>(permuted(next_thread++, threads.size()));
            Thread& thread = threads[running->thread];
            thread.fiber = running;
            threadIdx = thread.index;
            thread_body(thread_context);
            threads[running->thread].returned = true;
        }
        idle.push_back(running);
        to_scheduler();
    }
}

Fiber* idle_fiber() {
    if (idle.empty()) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber* fiber = fibers.back().get();
        char* memory = static_cast<char*>(
            mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (memory == MAP_FAILED) throw std::bad_alloc();
        mprotect(memory, kPage, PROT_NONE);
        fiber->bottom = memory + kPage;
        fiber->size = kStack;
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = fiber->bottom;
        fiber->start.uc_stack.ss_size = fiber->size;
        fiber->start.uc_link = nullptr;
        makecontext(&fiber->start, fiber_main, 0);
        idle.push_back(fiber);
    }
    Fiber* fiber = idle.back();
    idle.pop_back();
    return fiber;
}

bool same(const Site& a, const Site& b) { return a.line == b.line && a.mask == b.mask && !strcmp(a.file, b.file); }

// The threads that meet thread k where it waits; none while some of them are still elsewhere.
std::vector<unsigned> met(unsigned k) {
    const unsigned mask = threads[k].site.mask, count = static_cast<unsigned>(threads.size());
    const unsigned first = mask ? k / warpSize * warpSize : 0;
    const unsigned last = mask ? std::min(first + warpSize, count) : count;
    std::vector<unsigned> group;
    for (unsigned i = first; i < last; ++i) {
        if (mask && !(mask >> (i - first) & 1u)) continue;
        if (!threads[i].waits || !same(threads[i].site, threads[k].site)) return {};
        group.push_back(i);
    }
    return group;
}

std::vector<unsigned> released() {
    std::vector<unsigned> all;
    for (unsigned k = 0; k < threads.size(); ++k) {
        if (!threads[k].waits) continue;
        const std::vector<unsigned> group = met(k);
        for (unsigned i : group) {
            threads[i].waits = false;
            if (!threads[i].site.mask) continue;
            for (unsigned j : group) threads[i].lanes[j % warpSize] = threads[j].value;
        }
        all.insert(all.end(), group.begin(), group.end());
        if (!group.empty() && !threads[k].site.mask) break;
    }
    return all;
}

std::string described(const Site& site) {
    return std::string(site.file) + ":" + std::to_string(site.line);
}

[[noreturn]] void stop(std::string why) {
    // Stacks of threads that never return are left as they are.
    for (auto& fiber : fibers) (void)fiber.release();
    fibers.clear();
    idle.clear();
    failure.clear();
    throw std::runtime_error("cuda_on_cpu: " + why);
}

[[noreturn]] void stop_stuck() {
    std::vector<std::pair<Site, int>> sites;
    int gone = 0;
    for (const Thread& thread : threads) {
        gone += thread.returned;
        if (!thread.waits) continue;
        auto at = sites.begin();
        while (at != sites.end() && !same(at->first, thread.site)) ++at;
        if (at == sites.end()) at = sites.insert(at, {thread.site, 0});
        ++at->second;
    }
    std::string why = "a barrier that not all threads reach:";
    for (const auto& [site, count] : sites) why += " " + std::to_string(count) + " wait at " + described(site) + ",";
    stop(why + " " + std::to_string(gone) + " of " + std::to_string(threads.size()) + " have returned");
}

// Bytes that are NaN in every float format, and no small integer.
void poison_shared_memory() {
    for (const Range& range : shared_memory) {
        volatile uint8_t* bytes = static_cast<uint8_t*>(range.first);
        for (size_t i = 0; i < range.bytes; ++i) bytes[i] = i % 2 ? 0x7f : 0xf8;
    }
}

void run_block() {
    poison_shared_memory();
    const unsigned width = blockDim.x, height = blockDim.y;
    threads.resize(static_cast<size_t>(width) * height * blockDim.z);
    for (unsigned k = 0; k < threads.size(); ++k) {
        threads[k].index = {k % width, k / width % height, k / width / height};
        threads[k].waits = threads[k].returned = false;
    }
    next_thread = 0;
    while (next_thread < threads.size()) {
        resume(idle_fiber());
        if (!failure.empty()) stop(failure);
    }
    for (;;) {
        std::vector<unsigned> ready = released();
        if (ready.empty()) break;
        for (size_t k = 0; k < ready.size(); ++k) {
            const Thread& thread = threads[ready[permuted(k, ready.size())]];
            threadIdx = thread.index;
            resume(thread.fiber);
            if (!failure.empty()) stop(failure);
        }
    }
    for (const Thread& thread : threads)
        if (!thread.returned) stop_stuck();
}

void check(dim3 grid, dim3 block) {
    const uint64_t count = static_cast<uint64_t>(block.x) * block.y * block.z;
    const auto text = [](dim3 v) {
        return std::to_string(v.x) + " x " + std::to_string(v.y) + " x " + std::to_string(v.z);
    };
    if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
        throw std::runtime_error("cuda_on_cpu: invalid configuration: a grid of " + text(grid));
    if (!count || count > 1024 || block.z > 64)
        throw std::runtime_error("cuda_on_cpu: invalid configuration: a block of " + text(block));
}

}  // namespace

void wait(Site site) {
    Thread& self = threads[running->thread];
    self.site = site;
    self.waits = true;
    to_scheduler();
}

const uint64_t* exchange(uint64_t value, Site site) {
    Thread& self = threads[running->thread];
    if (!(site.mask >> running->thread % warpSize & 1u)) fail(site, "is reached by a lane that is not in the mask");
    self.value = value;
    wait(site);
    return self.lanes;
}

void fail(Site site, const char* why) {
    failure = described(site) + " " + why;
    to_scheduler();
    __builtin_unreachable();
}

void run(const void* kernel, dim3 grid, dim3 block, void (*body)(const void*), const void* context) {
    check(grid, block);
    const std::lock_guard<std::mutex> lock(one_launch);
    launches.push_back({kernel, grid, block});
    gridDim = grid;
    blockDim = block;
    thread_body = body;
    thread_context = context;
    const uint64_t all = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    if (first_block >= all) return;
    const uint64_t count = std::min(last_block, all - 1) - first_block + 1;
    if (count > kMostBlocks) throw std::runtime_error("cuda_on_cpu: too many blocks: set a window");
    for (uint64_t k = 0; k < count; ++k) {
        const uint64_t at = first_block + permuted(k, count);
        blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                    static_cast<unsigned>(at / grid.x / grid.y)};
        run_block();
    }
}

}  // namespace cuda_on_cpu

// What tests set and read, through ctypes.
#pragma GCC visibility push(default)
extern "C" {
// Of each launch only these blocks, in the order x, y, z of the grid.
void cuda_on_cpu_window(uint64_t first, uint64_t last) {
    cuda_on_cpu::first_block = first;
    cuda_on_cpu::last_block = last;
}
// 0: blocks and threads one after the other, 1: backwards, 2: mixed.
void cuda_on_cpu_order(int order) { cuda_on_cpu::order = order; }
void cuda_on_cpu_add_shared(void* first, size_t bytes) { cuda_on_cpu::shared_memory.push_back({first, bytes}); }
// Address of the kernel and size of grid and block of the launch, in `out`; false where there were fewer.
bool cuda_on_cpu_launch(size_t k, uint64_t* out) {
    if (k >= cuda_on_cpu::launches.size()) return false;
    const auto& launch = cuda_on_cpu::launches[k];
    const uint64_t values[] = {reinterpret_cast<uintptr_t>(launch.kernel), launch.grid.x, launch.grid.y, launch.grid.z,
                               launch.block.x, launch.block.y, launch.block.z};
    memcpy(out, values, sizeof values);
    return true;
}
void cuda_on_cpu_forget_launches() { cuda_on_cpu::launches.clear(); }
}
#pragma GCC visibility pop
