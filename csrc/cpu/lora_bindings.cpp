#include "lora_bindings.h"

#include <pybind11/stl.h>

#include <vector>

#include "../common/address.h"
#include "dispatch.h"
#include "lora_linear.h"

namespace py = pybind11;

namespace fastsample {
namespace {

// Groups of adapters: an address each of down, up and scale, and a rank for each linear of each group.
void linear(Address x, int64_t samples, int64_t rows, int64_t x_stride, int layout, int products,
            int64_t depth, Address weights, const std::vector<int64_t>& columns, Address bias, const std::vector<Address>& down,
            const std::vector<Address>& up, const std::vector<Address>& scale, const std::vector<int64_t>& ranks,
            Address group_of, const std::vector<Address>& out, int threads) {
    std::vector<LoraAdapters> groups;
    for (size_t g = 0; g < down.size(); ++g)
        groups.push_back({at<const void>(down[g]), at<const void>(up[g]), at<const float>(scale[g]),
                          ranks.data() + g * columns.size()});
    std::vector<void*> outputs;
    for (Address one : out) outputs.push_back(at<void>(one));
    const LoraArgs args{at<const void>(x), x_stride, layout, products, depth, at<const void>(weights),
                        static_cast<int>(columns.size()), columns.data(), at<const float>(bias), nullptr,
                        outputs.data()};
    py::gil_scoped_release released;
    lora_linear(args, groups, samples, rows, at<const int64_t>(group_of), threads);
}

}  // namespace

void bind_lora(py::module_& module) {
    module.def("lora_packed_size", &packed_size);
    module.def("lora_pack", [](Address weight, int64_t n, int64_t k, int layout, Address packed, int threads) {
        py::gil_scoped_release released;
        lora_pack(at<const void>(weight), n, k, layout, at<void>(packed), threads);
    });
    module.def("lora_unpack", [](Address packed, int64_t n, int64_t k, int layout, Address weight, int threads) {
        py::gil_scoped_release released;
        lora_unpack(at<const void>(packed), n, k, layout, at<void>(weight), threads);
    });
    module.def("lora_linear", &linear);
    module.def("lora_layout", &lora_layout);
    module.def("fma_peak", [](int64_t rounds, int dtype, int threads) {
        py::gil_scoped_release released;
        return lora_multiply_adds(rounds, dtype, threads);
    });
}

}  // namespace fastsample
