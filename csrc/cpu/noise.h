#pragma once
#include <cstdint>

namespace fastsample {

// Normals for `batch` samples of `size` elements, one key each, on at most `threads` threads.
void randn(float* out, int64_t batch, int64_t size, const uint64_t* keys, uint32_t step, uint32_t stream, int threads);

// The keys of `batch` samples of this seed, the first one at place `index`.
void sample_keys(uint64_t* out, int64_t batch, uint64_t seed, uint64_t index);

}  // namespace fastsample
