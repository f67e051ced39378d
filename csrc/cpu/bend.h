#pragma once
#include "kernels.h"

namespace fastsample {

// Which method bends the guidance.
enum Method { kPlain = 0, kCfgZeroStar = 1, kApg = 2 };

// What fastsample/ops/bend specifies.
struct BendSettings {
    int method;
    double rescale, eta, norm_threshold;
};

// The output that both halves make, on at most `threads` threads. `args` lacks `sums` and `shares`.
void bend(BendArgs args, const BendSettings& settings, int threads);

}  // namespace fastsample
