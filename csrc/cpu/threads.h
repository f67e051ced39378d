#pragma once
#include <cstdint>

namespace fastsample {

// Cuts [0, units) into one contiguous range per thread and runs body(context, begin, end) on each, at most `threads` at
// once; returns when all are done. Uses the OpenMP team of the torch that is loaded, so that torch's threads and ours
// are the same and never compete for cores; without one, plain threads.
void parallel(int64_t units, int threads, void (*body)(const void*, int64_t, int64_t), const void* context);

// How many threads this much work keeps busy, `grain` units each: at least 1, at most `threads`.
int useful_threads(int threads, int64_t work, int64_t grain);

// A second thread is worth waking for 5 to 10 us of work each: so many elements of a plain step, or of normals. An image
// latent of 4x64x64 stays on the calling thread, where a busy machine cannot delay it.
constexpr int64_t kStepGrain = 32768;
constexpr int64_t kNoiseGrain = 16384;

// What torch computes from now on when the calling thread asks it to, it computes on that thread alone; other threads keep
// what they have, which torch.set_num_threads would not leave to them. Whether it could be arranged.
bool keep_to_this_thread();

// "torch-openmp" or "std-thread".
const char* thread_runtime();

}  // namespace fastsample
