// AMX's tile instructions for a CPU without them: included before csrc/cpu/lora_amx.cpp, whose own text is what runs.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace amx_on_cpu {

void configure(const void* configuration);
void release();
void zero(int tile);
void load(int tile, const void* rows, int64_t stride);
void store(int tile, void* rows, int64_t stride);
void multiply(int sums, int x, int w);

// What has run since the last call, on all threads, and how many threads hold tiles now.
struct Counts {
    int64_t products, loads, stores, configured;
};
Counts take_counts();

}  // namespace amx_on_cpu

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(configuration) amx_on_cpu::configure(configuration)
#define _tile_release() amx_on_cpu::release()
#define _tile_zero(tile) amx_on_cpu::zero(tile)
#define _tile_loadd(tile, rows, stride) amx_on_cpu::load(tile, rows, stride)
#define _tile_stored(tile, rows, stride) amx_on_cpu::store(tile, rows, stride)
#define _tile_dpbf16ps(sums, x, w) amx_on_cpu::multiply(sums, x, w)
