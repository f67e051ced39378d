// Philox and Box-Muller: what fastsample/ops/noise specifies. Writes 4 bytes a normal, reads nothing.
#include "common.h"

namespace fastsample {
namespace cuda {
namespace {

template <int kCount>
__global__ void __launch_bounds__(kBlockThreads, kBlocksResident) normals_kernel(const NormalsArgs args) {
    each_thread<kCount>(args.batch, args.size, [&](int64_t sample, int64_t first, int count) {
        F z[kCount];
        draw<kCount>(z, first, args.keys[sample], args.step, args.stream);
        store<kCount>(args.out + sample * args.size + first, count, z);
    });
}

}  // namespace

void normals(const NormalsArgs& args, Stream stream) {
    const bool whole = args.size % kWhole == 0 && aligned(args.out);
    const Shape shape = shape_of(args.batch, args.size, whole ? kWhole : kPart);
    launch(whole ? normals_kernel<kWhole> : normals_kernel<kPart>, shape.grid, shape.block, args,
           static_cast<cudaStream_t>(stream));
}

}  // namespace cuda
}  // namespace fastsample
