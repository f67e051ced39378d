#pragma once
#include <memory>
#include <vector>

#include "kernels.h"

namespace fastsample {

// The step with everything fixed that stays the same from row to row, dealt out to threads.
class Step {
public:
    // rescale: phi of guidance rescale; thresholds: whether a row has a quantile; one_guidance: whether all weights are
    // equal.
    Step(const StepArgs& fixed, float rescale, bool thresholds, bool one_guidance);

    const StepArgs& fixed() const { return fixed_; }
    int64_t elements() const { return fixed_.batch * fixed_.size; }

    // One row: `args` are the fixed ones and what differs from row to row.
    void run(StepArgs args, int threads);

private:
    struct Job;

    void reduce(const StepArgs& args, int threads, void (*one)(const Job&, int64_t sample, int64_t first));

    StepArgs fixed_;
    float rescale_;
    bool thresholds_, one_guidance_;
    std::vector<float> factors_, bounds_;
    std::unique_ptr<float[]> scratch_;
};

}  // namespace fastsample
