#include "threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace fastsample {
namespace {

struct Team {
    // GNU OpenMP's stable entry points; LLVM's runtime exports them too.
    void (*run)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*size)() = nullptr;
    int (*rank)() = nullptr;
    bool found() const { return run && size && rank; }
};

// Looked up through libtorch_cpu's own dependencies: wheels rename their libgomp, and linking another one would start a
// second team of threads.
void* torch_library() {
    for (const char* name : {"libtorch_cpu.so", "libtorch_cpu.dylib"})
        if (void* torch = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) return torch;
    return nullptr;
}

Team find_team() {
    Team team;
    if (void* torch = torch_library()) {
        team.run = reinterpret_cast<decltype(team.run)>(dlsym(torch, "GOMP_parallel"));
        team.size = reinterpret_cast<decltype(team.size)>(dlsym(torch, "omp_get_num_threads"));
        team.rank = reinterpret_cast<decltype(team.rank)>(dlsym(torch, "omp_get_thread_num"));
        dlclose(torch);
    }
    return team;
}

const Team& team() {
    static const Team found = find_team();
    return found;
}

struct Job {
    int64_t units;
    void (*body)(const void*, int64_t, int64_t);
    const void* context;

    void part(int64_t rank, int64_t size) const {
        const int64_t begin = units * rank / size, end = units * (rank + 1) / size;
        if (begin < end) body(context, begin, end);
    }
};

void run_part(void* job) { static_cast<const Job*>(job)->part(team().rank(), team().size()); }

}  // namespace

void parallel(int64_t units, int threads, void (*body)(const void*, int64_t, int64_t), const void* context) {
    if (threads > units) threads = static_cast<int>(units);
    Job job{units, body, context};
    if (threads <= 1) {
        job.part(0, 1);
    } else if (team().found()) {
        team().run(run_part, &job, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        others.reserve(static_cast<size_t>(threads));
        int rank = 1;
        try {
            for (; rank < threads; ++rank) others.emplace_back(&Job::part, &job, rank, threads);
        } catch (const std::system_error&) {
            // The process may start no more threads: the rest is done here.
        }
        job.part(0, threads);
        for (; rank < threads; ++rank) job.part(rank, threads);
        for (std::thread& other : others) other.join();
    }
}

int useful_threads(int threads, int64_t work, int64_t grain) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work / grain)));
}

bool keep_to_this_thread() {
    void* torch = torch_library();
    if (!torch) return false;
    const auto openmp = reinterpret_cast<void (*)(int)>(dlsym(torch, "omp_set_num_threads"));
    // MKL has a number of its own, which torch sets beside OpenMP's.
    const auto mkl = reinterpret_cast<int (*)(int)>(dlsym(torch, "MKL_Set_Num_Threads_Local"));
    if (openmp) openmp(1);
    if (mkl) mkl(1);
    dlclose(torch);
    return openmp != nullptr;
}

const char* thread_runtime() { return team().found() ? "torch-openmp" : "std-thread"; }

}  // namespace fastsample
