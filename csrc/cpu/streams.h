// The lower bounds that benchmarks compare with, on threads as the step is.
#pragma once
#include <cstdint>
#include <vector>

namespace fastsample {

void copy(float* out, const float* in, int64_t count, int threads);

// y = a*y + s*(the sum of x), of 1 to 5 x; throws std::invalid_argument for another number.
void triad(float* y, const std::vector<const float*>& x, float a, float s, int64_t count, int threads);

}  // namespace fastsample
