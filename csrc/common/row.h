// One row of fastsample.tables.Table.packed, 64 bytes: four 128-bit loads on a GPU.
#pragma once

namespace fastsample {

// s holds s exp(g0), g1 holds g1 / ln 2, next_e the scale of the next row's input. Where x0 is not limited p and q make
// the entry, and a and d all of x' that x and m have in it.
struct Row {
    float p, q, a, b, c1, c2, c3, d, s, g1, limit, quantile, next_e, hx, h0, unused;
};

}  // namespace fastsample
