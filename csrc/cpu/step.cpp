#include "step.h"

#include "dispatch.h"
#include "threads.h"

namespace fastsample {

Step::Step(const StepArgs& fixed, float rescale, bool thresholds, bool one_guidance)
    : fixed_(fixed), rescale_(rescale), thresholds_(thresholds), one_guidance_(one_guidance) {
    if (rescale != 0) factors_.resize(fixed.batch);
    if (thresholds) {
        bounds_.resize(fixed.batch);
        scratch_.reset(new float[elements()]);  // touched only as far as threads need it
    }
}

struct Step::Job {
    Step* self;
    const StepArgs* args;
    void (*one)(const Job&, int64_t sample, int64_t first);
};

void Step::run(StepArgs args, int threads) {
    const bool guided = args.uncond != nullptr, rescales = guided && rescale_ != 0;
    if (rescales) {
        reduce(args, threads, [](const Job& job, int64_t sample, int64_t) {
            job.self->factors_[sample] = kernels().rescale_factor(job.args, sample, job.self->rescale_);
        });
        args.factors = factors_.data();
    }
    if (thresholds_) {
        reduce(args, threads, [](const Job& job, int64_t sample, int64_t first) {
            // Each thread stays in the place of its first sample.
            float* scratch = job.self->scratch_.get() + first * job.args->size;
            job.self->bounds_[sample] = kernels().threshold(job.args, sample, scratch);
        });
        args.bounds = bounds_.data();
    }
    const bool draws = !args.z && args.keys && (args.row_of || args.rows[args.row].s != 0.0f);
    const bool alike = !draws && !args.row_of && !args.low && !args.log_prob_sums && !rescales && !thresholds_ && (!guided || one_guidance_);
    if (alike && args.m_stride == args.size) {
        // Nothing tells the samples apart: one long sample has fewer partial vectors.
        args.size = args.m_stride = elements();
        args.batch = 1;
    }
    const int64_t blocks = args.batch * ((args.size + kBlock - 1) / kBlock);
    const auto body = [](const void* context, int64_t begin, int64_t end) {
        kernels().step(static_cast<const StepArgs*>(context), begin, end);
    };
    parallel(blocks, useful_threads(threads, elements(), draws ? kNoiseGrain : kStepGrain), body, &args);
}

void Step::reduce(const StepArgs& args, int threads, void (*one)(const Job&, int64_t, int64_t)) {
    const Job job{this, &args, one};
    const auto body = [](const void* context, int64_t begin, int64_t end) {
        const Job& job = *static_cast<const Job*>(context);
        for (int64_t sample = begin; sample < end; ++sample) job.one(job, sample, begin);
    };
    parallel(args.batch, useful_threads(threads, elements(), kNoiseGrain), body, &job);
}

}  // namespace fastsample
