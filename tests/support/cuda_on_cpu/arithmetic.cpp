// What csrc/cuda/lanes.h computes from the GPU's approximate reciprocals, from any that PTX allows: prints how many
// radii and quotients were looked at and how many differ from the correctly rounded ones.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "../../../csrc/cuda/launch.h"

namespace {

#include "../../../csrc/cuda/lanes.h"
#include "../../../csrc/common/normal.h"

long looked = 0, wrong = 0;

// check(approximation) for the floats within 2^-22.9 of `exact`; one that is no normal number may be rounded once more.
template <class Check>
void each_approximation(double exact, Check check) {
    const U middle = as_bits((float)exact);
    const double within = exact * exp2(-22.9) + (exact < 1.17549435082228751e-38 ? exp2(-150) : 0);
    for (U bits = middle - 3; bits != middle + 4; ++bits) {
        if (fabs(as_float(bits) - exact) > within) continue;
        ++looked;
        wrong += !check(as_float(bits));
    }
}

void radii() {
    for (U x = 0; x < 1u << 24; ++x) {
        const F square = minus_two_log(fma((float)x, 5.9604644775390625e-8f, 2.98023223876953125e-8f));
        const F root = sqrtf(square);
        if (square == 0) {
            ++looked;
            wrong += square_root(square) != 0;
            continue;
        }
        wrong += square < 7.8886090522101181e-31f;
        each_approximation(1 / sqrt((double)square), [&](F y) { return refine_root(square, y) == root; });
    }
}

// Divisors from the smallest normal number to the largest; of the dividends half are as small as floats get.
void quotients() {
    uint64_t state = 1;
    const auto random = [&] { return (uint32_t)((state = state * 6364136223846793005u + 1442695040888963407u) >> 32); };
    for (int i = 0; i < 4000000; ++i) {
        const F by = as_float(i == 0 ? 0x7f7fffffu : 0x00800000u + random() % 0x7f000000u);
        F a = as_float(i % 2 ? random() : random() & 0x80ffffffu);
        if (i % 64 == 0) a = by * (float)(random() & 0xffu) * 1.40129846432481707e-45f;
        if (!(fabsf(a) <= by)) continue;
        each_approximation(1 / (double)by, [&](F y) { return as_bits(refine_quotient(a, by, y)) == as_bits(a / by); });
    }
}

}  // namespace

int main() {
    radii();
    printf("radii %ld %ld\n", looked, wrong);
    looked = wrong = 0;
    quotients();
    printf("quotients %ld %ld\n", looked, wrong);
}
