#pragma once
#include <vector>

#include "lora.h"

namespace fastsample {

// Rows to panels and back, bit for bit.
void lora_pack(const void* weight, int64_t n, int64_t k, int layout, void* packed, int threads);
void lora_unpack(const void* packed, int64_t n, int64_t k, int layout, void* weight, int threads);

// A group of adapters as Python packs it.
struct LoraAdapters {
    const void *down, *up;  // A of all linears; B of each, one after the other
    const float* scale;
    const int64_t* ranks;  // of each linear
};

// `samples` samples of `rows` rows of x each. group_of: of each sample, -1 none; null: group 0 for all, if there is one.
// Throws std::out_of_range for a group that is not there and std::bad_alloc, before anything is written.
void lora_linear(LoraArgs args, const std::vector<LoraAdapters>& groups, int64_t samples, int64_t rows,
                 const int64_t* group_of, int threads);

// Multiply-adds between registers, as many rounds on each thread; returns the FLOPs done in all.
int64_t lora_multiply_adds(int64_t rounds, int dtype, int threads);

}  // namespace fastsample
