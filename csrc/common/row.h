// One row of fastsample.tables.Table.packed, 64 bytes: four 128-bit loads on a GPU.
#pragma once

namespace fastsample {

// s holds s exp(g0), g1 holds g1 / ln 2, next_e the scale of the next row's input.
struct Row {
    float p, q, a, b, c1, c2, d, s, g1, limit, quantile, next_e, folded_x, folded_m, unused[2];
};

}  // namespace fastsample
