// One step over `batch` samples of `size` elements each, on raw addresses: host memory for the CPU kernels, the
// device's for CUDA. Absent operands are null.
#pragma once
#include <stdint.h>

#include "row.h"

namespace fastsample {

enum DType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct StepArgs {
    const Row* rows;
    const int64_t* row_of;  // one per sample, else
    int64_t row;            // the same for all; it is the step of the noise counter too
    int64_t batch, size;
    const float* x;
    const void *m, *uncond;  // uncond only under guidance; m then is the conditional half
    int64_t m_stride;        // elements from one sample to the next: size, or 2 * size where the variance half follows
    int m_dtype;
    const float* guidance;  // one weight per sample
    const float* factors;   // of m, one per sample: guidance rescale
    const float* bounds;    // of |x0|, one per sample: dynamic thresholding
    const float *h1, *h2, *h3;
    const float* z;         // given noise, else
    const uint64_t* keys;  // one per sample: noise drawn in the pass; with neither there is none
    float* out;
    float* x0_out;  // of the entry
    void *input_out, *second_input_out;
    int input_dtype;
    const float *low, *high;  // of one sample: what x0 is clamped to in rows that limit it, in place of their limit; or null
    double* log_prob_sums;  // [batch, log_prob_parts(size), 2]: of a part of a sample, sums of z^2 and of g1 v / ln 2; or null
};

}  // namespace fastsample
