// Arrays in memory as kernels read and write them, in one of the three dtypes.
#pragma once
#include <cmath>
#include <cstring>

#include "../../../csrc/common/step_args.h"
#include "cases.h"

using Bytes = std::vector<char>;

template <class T>
Bytes bytes_of_all(const std::vector<T>& values) {
    Bytes bytes(values.size() * sizeof(T));
    if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
}

inline size_t size_of(int dtype) { return dtype == fastsample::kFloat32 ? 4 : 2; }

inline Bytes operand(const Case& of, const std::string& array, int dtype) {
    return dtype == fastsample::kFloat32 ? bytes_of_all(of.all<float>(array)) : bytes_of_all(of.all<uint16_t>(array));
}

// All bits are set, which is a NaN in each dtype: what is not written shows.
inline Bytes unwritten(size_t count, int dtype) { return Bytes(count * size_of(dtype), '\xff'); }

inline double value(const Bytes& bytes, size_t i, int dtype) {
    const char* from = bytes.data() + i * size_of(dtype);
    if (dtype == fastsample::kFloat32) {
        float number;
        std::memcpy(&number, from, 4);
        return number;
    }
    uint16_t half;
    std::memcpy(&half, from, 2);
    if (dtype == fastsample::kBFloat16) {
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float number;
        std::memcpy(&number, &bits, 4);
        return number;
    }
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) return fraction ? NAN : half >> 15 ? -INFINITY : INFINITY;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return half >> 15 ? -size : size;
}
