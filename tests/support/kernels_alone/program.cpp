// Runs the CPU kernels on every case of a file of golden values, with neither Python nor torch:
// `program FILE` prints what differs and how much was compared, and fails where anything does.
#include <cinttypes>
#include <cstdio>
#include <fstream>

#include "../../../csrc/cpu/dispatch.h"
#include "../../../csrc/cpu/lora_linear.h"
#include "../../../csrc/cpu/noise.h"
#include "../../../csrc/cpu/step.h"
#include "memory.h"

using namespace fastsample;

namespace {

constexpr int kThreads = 2;
int64_t compared = 0, wrong = 0;

template <class T>
void same(const Case& of, const char* array, const std::vector<T>& got) {
    const std::vector<T> want = of.all<T>(array);
    if (got.size() != want.size()) throw std::runtime_error(of.name + ": another number of values in " + array);
    for (size_t i = 0; i < want.size(); ++i, ++compared) {
        if (got[i] == want[i]) continue;
        ++wrong;
        std::printf("%s %s: %s[%zu] is %" PRIu64 ", not %" PRIu64 "\n", of.kind.c_str(), of.name.c_str(), array, i,
                    static_cast<uint64_t>(got[i]), static_cast<uint64_t>(want[i]));
    }
}

// From place `first` of the golden values on.
void near(const Case& of, const std::string& array, const Bytes& got, int dtype, size_t first = 0) {
    const std::vector<double> want = of.all<double>(array), error = of.all<double>(array + "_error");
    for (size_t i = 0; i < got.size() / size_of(dtype); ++i, ++compared) {
        const double number = value(got, i, dtype), right = want.at(first + i), most = error.at(first + i);
        if (std::fabs(number - right) <= most) continue;
        ++wrong;
        std::printf("%s %s: %s[%zu] is %.9g, not %.9g +- %.2g\n", of.kind.c_str(), of.name.c_str(), array.c_str(),
                    first + i, number, right, most);
    }
}

void check_philox(const Case& c) {
    std::vector<uint32_t> out(4);
    kernels().philox(c.all<uint32_t>("counter").data(), c.all<uint32_t>("key").data(), out.data());
    same(c, "out", out);
}

void check_keys(const Case& c) {
    std::vector<uint64_t> out(c.all<uint64_t>("out").size());
    sample_keys(out.data(), static_cast<int64_t>(out.size()), c.one<uint64_t>("seed"), c.one<uint64_t>("index"));
    same(c, "out", out);
}

void check_normals(const Case& c) {
    const auto keys = c.all<uint64_t>("keys");
    const auto size = c.one<size_t>("size");
    std::vector<float> out(keys.size() * size);
    randn(out.data(), static_cast<int64_t>(keys.size()), static_cast<int64_t>(size), keys.data(),
          c.one<uint32_t>("step"), c.one<uint32_t>("stream"), kThreads);
    std::vector<uint32_t> bits;
    for (const size_t place : c.all<size_t>("places")) {
        bits.emplace_back();
        std::memcpy(&bits.back(), &out.at(place), 4);
    }
    same(c, "bits", bits);
}

const float* or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

void check_step(const Case& c) {
    const Bytes rows = bytes_of_all(c.all<float>("rows"));
    const auto x = c.all<float>("x"), h1 = c.all<float>("h1"), h2 = c.all<float>("h2"), h3 = c.all<float>("h3"),
               z = c.all<float>("z"), guidance = c.all<float>("guidance");
    const auto keys = c.all<uint64_t>("keys");
    const int dtype = c.one<int>("dtype");
    const Bytes m = operand(c, "m", dtype);
    Bytes out = unwritten(x.size(), kFloat32), entry = out, input = unwritten(x.size(), dtype);

    StepArgs args{};
    args.rows = reinterpret_cast<const Row*>(rows.data());
    args.row = c.one<int64_t>("row");
    args.batch = c.one<int64_t>("batch");
    args.size = static_cast<int64_t>(x.size()) / args.batch;
    args.x = x.data();
    args.guidance = or_null(guidance);
    const size_t half = guidance.empty() ? 0 : m.size() / 2;
    args.uncond = half ? m.data() : nullptr;
    args.m = m.data() + half;
    args.m_stride = static_cast<int64_t>((m.size() - half) / size_of(dtype)) / args.batch;
    args.m_dtype = args.input_dtype = dtype;
    args.h1 = or_null(h1);
    args.h2 = or_null(h2);
    args.h3 = or_null(h3);
    args.z = or_null(z);
    args.keys = keys.empty() ? nullptr : keys.data();
    args.out = reinterpret_cast<float*>(out.data());
    args.x0_out = reinterpret_cast<float*>(entry.data());
    args.input_out = input.data();
    Step(args, c.one<float>("rescale"), c.one<int>("thresholds") != 0, false).run(args, kThreads);
    near(c, "out", out, kFloat32);
    near(c, "entry", entry, kFloat32);
    near(c, "input", input, dtype);
}

// Matrices of `rows` rows each that lie behind one another, packed behind one another.
Bytes packed(const Bytes& matrices, const std::vector<int64_t>& rows, const std::vector<int64_t>& depths, int layout) {
    Bytes all;
    const char* from = matrices.data();
    for (size_t i = 0; i < rows.size(); ++i) {
        Bytes panels(static_cast<size_t>(packed_size(rows[i], depths[i], layout) * bytes_of(layout)));
        lora_pack(from, rows[i], depths[i], layout, panels.data(), kThreads);
        from += rows[i] * depths[i] * bytes_of(layout);
        all.insert(all.end(), panels.begin(), panels.end());
    }
    return all;
}

void check_lora(const Case& c) {
    const int dtype = c.one<int>("dtype"), layout = lora_layout(dtype);
    const auto columns = c.all<int64_t>("columns"), ranks = c.all<int64_t>("ranks"), groups = c.all<int64_t>("group_of");
    const auto depth = c.one<int64_t>("depth"), samples = static_cast<int64_t>(groups.size());
    const auto bias = c.all<float>("bias"), scale = c.all<float>("scale");
    const Bytes x = operand(c, "x", dtype);
    const Bytes weights = packed(operand(c, "weights", dtype), columns, {depth, depth}, layout);
    const Bytes down = packed(operand(c, "down", dtype), {static_cast<int64_t>(scale.size())}, {depth}, layout);
    const Bytes up = packed(operand(c, "up", dtype), columns, ranks, layout);
    std::vector<Bytes> results;
    for (const int64_t n : columns) results.push_back(unwritten(static_cast<size_t>(samples * n), dtype));
    std::vector<void*> out;
    for (Bytes& result : results) out.push_back(result.data());

    const int linears = static_cast<int>(columns.size());
    const LoraArgs args{x.data(), depth,          layout,      1,       depth,     weights.data(),
                        linears,  columns.data(), bias.data(), nullptr, out.data()};
    lora_linear(args, {{down.data(), up.data(), scale.data(), ranks.data()}}, samples, 1, groups.data(), kThreads);
    size_t first = 0;
    for (const Bytes& result : results) {
        near(c, "y", result, dtype, first);
        first += result.size() / size_of(dtype);
    }
}

const std::map<std::string, void (*)(const Case&)> kChecks = {
    {"philox", check_philox}, {"keys", check_keys}, {"normals", check_normals}, {"step", check_step}, {"lora", check_lora},
};

}  // namespace

int main(int, char** arguments) {
    std::ifstream file(arguments[1]);
    const std::vector<Case> cases = read_cases(file);
    for (const Case& c : cases) kChecks.at(c.kind)(c);
    std::printf("%zu cases at level %s: %" PRId64 " values, %" PRId64 " wrong\n", cases.size(), isa().c_str(), compared,
                wrong);
    return cases.empty() || wrong ? 1 : 0;
}
