#include "bend.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "threads.h"

namespace fastsample {
namespace {

constexpr double kTiny = 1e-8;      // beside a squared norm, as the methods' authors have it
constexpr double kRounding = 1e-12;  // of a sum of doubles: a variance below that is of a constant

BendSums whole(const BendSums* blocks, int64_t count) {
    BendSums sum = {};
    for (int64_t k = 0; k < count; ++k) {
        const BendSums& one = blocks[k];
        sum.c += one.c, sum.u += one.u, sum.d += one.d;
        sum.cc += one.cc, sum.uu += one.uu, sum.dd += one.dd;
        sum.cu += one.cu, sum.cd += one.cd, sum.ud += one.ud;
    }
    return sum;
}

// What moves without momentum: d = c - u.
void take_difference(BendSums* s) {
    s->d = s->c - s->u;
    s->dd = std::max(s->cc - 2 * s->cu + s->uu, 0.0);  // NaN stays NaN
    s->cd = s->cc - s->cu;
    s->ud = s->cu - s->uu;
}

double variance(double square, double sum, double size, double largest) {
    const double left = square - sum * sum / size;
    return left <= kRounding * largest ? 0 : left;  // NaN stays NaN
}

// phi std(m_c) / std(m) + 1 - phi for m = c share + u share + d share.
double rescale(const BendSums& s, const double* share, double size, double phi) {
    const double c = share[0], u = share[1], d = share[2];
    const double squares = c * c * s.cc + u * u * s.uu + d * d * s.dd;
    const double square = squares + 2 * (c * u * s.cu + c * d * s.cd + u * d * s.ud);
    const double of_m = variance(square, c * s.c + u * s.u + d * s.d, size, squares);
    if (of_m == 0) return 1;
    return phi * std::sqrt(variance(s.cc, s.c, size, s.cc) / of_m) + (1 - phi);
}

// What m has of the conditional half, of the unconditional one and of what moves.
void find_shares(const BendSettings& settings, const BendSums& s, double weight, double size, bool moves, float* to) {
    double share[3] = {weight, 1 - weight, 0};
    if (settings.method == kCfgZeroStar) {
        share[1] *= s.cu / (s.uu + kTiny);
    } else if (settings.method == kApg) {
        const double length = std::sqrt(s.dd), r = settings.norm_threshold;
        const double kept = r > 0 && !(length <= r) ? r / length : 1;
        const double along = kept * s.cd / std::max(s.cc, kTiny * kTiny);
        const double back = weight * (1 - settings.eta) * along, pushed = weight * kept;
        share[0] = moves ? -back : pushed - back;
        share[1] = moves ? 1 : 1 - pushed;
        share[2] = moves ? pushed : 0;
    }
    const double factor = settings.rescale != 0 ? rescale(s, share, size, settings.rescale) : 1;
    for (int k = 0; k < 3; ++k) to[k] = (float)(share[k] * factor);
    if (weight == 1) to[0] = 1, to[1] = to[2] = 0;  // m_c as it is, whatever the other holds
}

}  // namespace

void bend(BendArgs args, const BendSettings& settings, int threads) {
    const int64_t blocks = (args.size + kBlock - 1) / kBlock;
    std::vector<BendSums> sums(args.batch * blocks);
    std::vector<float> shares(3 * args.batch);
    args.sums = sums.data();
    const int useful = useful_threads(threads, args.batch * args.size, kStepGrain);
    const auto add_up = [](const void* context, int64_t begin, int64_t end) {
        kernels().bend_sums(static_cast<const BendArgs*>(context), begin, end);
    };
    parallel(args.batch * blocks, useful, add_up, &args);
    for (int64_t sample = 0; sample < args.batch; ++sample) {
        BendSums of_sample = whole(&sums[sample * blocks], blocks);
        if (!args.moved) take_difference(&of_sample);
        const bool moves = args.moved != nullptr;
        find_shares(settings, of_sample, args.weights[sample], (double)args.size, moves, &shares[3 * sample]);
    }
    args.shares = shares.data();
    const auto combine = [](const void* context, int64_t begin, int64_t end) {
        kernels().bend(static_cast<const BendArgs*>(context), begin, end);
    };
    parallel(args.batch * blocks, useful, combine, &args);
}

}  // namespace fastsample
