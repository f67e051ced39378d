#include "amx_on_cpu.h"

#include <math.h>
#include <string.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace amx_on_cpu {
namespace {

constexpr int kTiles = 8, kRows = 16, kBytes = 64, kFloats = 16;

struct Tiles {
    bool configured = false;
    int rows[kTiles], bytes[kTiles];
    alignas(64) unsigned char data[kTiles][kRows][kBytes];
};
thread_local Tiles tiles;
std::atomic<int64_t> products{0}, loads{0}, stores{0}, configured{0};

[[noreturn]] void fault(const char* what) {
    std::fprintf(stderr, "amx_on_cpu: %s\n", what);
    std::abort();
}

void check(int tile) {
    if (!tiles.configured) fault("a tile instruction without a configuration");
    if (tile < 0 || tile >= kTiles || tiles.rows[tile] == 0) fault("a tile that is not configured");
}

template <class To, class From>
To same_bits(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Subnormals count, and come out, as 0 of their sign; a new NaN is the one that x86 makes.
float flushed(float v) {
    const uint32_t bits = same_bits<uint32_t>(v);
    return same_bits<float>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

float upper(uint32_t pair) { return flushed(same_bits<float>(pair & 0xffff0000u)); }
float lower(uint32_t pair) { return flushed(same_bits<float>(pair << 16)); }

}  // namespace

void configure(const void* configuration) {
    const auto* bytes = static_cast<const unsigned char*>(configuration);
    if (reinterpret_cast<uintptr_t>(bytes) % 64) fault("a configuration across a cache line");
    if (bytes[0] != 1) fault("an unknown palette");
    for (int i = 0; i < kTiles; ++i) {
        uint16_t row_bytes;
        memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
        tiles.bytes[i] = row_bytes;
        tiles.rows[i] = bytes[48 + i];
        if (row_bytes > kBytes || tiles.rows[i] > kRows) fault("a tile that is too large");
    }
    if (tiles.configured) fault("tiles configured twice");
    memset(tiles.data, 0, sizeof tiles.data);
    tiles.configured = true;
    ++configured;
}

void release() {
    if (!tiles.configured) fault("tiles released twice");
    tiles.configured = false;
    --configured;
}

void zero(int tile) {
    check(tile);
    memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

void load(int tile, const void* rows, int64_t stride) {
    check(tile);
    memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
    for (int r = 0; r < tiles.rows[tile]; ++r)
        memcpy(tiles.data[tile][r], static_cast<const char*>(rows) + r * stride, static_cast<size_t>(tiles.bytes[tile]));
    ++loads;
}

void store(int tile, void* rows, int64_t stride) {
    check(tile);
    for (int r = 0; r < tiles.rows[tile]; ++r)
        memcpy(static_cast<char*>(rows) + r * stride, tiles.data[tile][r], static_cast<size_t>(tiles.bytes[tile]));
    ++stores;
}

// One chain of fused multiply-adds over the even k, one over the odd k, both from 0; their sum; then the sum in the tile.
void multiply(int sums, int x, int w) {
    check(sums), check(x), check(w);
    if (sums == x || sums == w || x == w) fault("a product with one tile twice");
    if (tiles.rows[w] * 4 != tiles.bytes[x] || tiles.rows[sums] != tiles.rows[x] || tiles.bytes[sums] != tiles.bytes[w])
        fault("tiles that do not fit");
    for (int m = 0; m < tiles.rows[sums]; ++m) {
        float even[kFloats] = {0}, odd[kFloats] = {0}, own[kFloats];
        for (int k = 0; k < tiles.rows[w]; ++k) {
            uint32_t a, b[kFloats];
            memcpy(&a, tiles.data[x][m] + 4 * k, sizeof a);
            memcpy(b, tiles.data[w][k], sizeof b);
            for (int n = 0; n < kFloats; ++n) even[n] = flushed(fmaf(lower(a), lower(b[n]), even[n]));
            for (int n = 0; n < kFloats; ++n) odd[n] = flushed(fmaf(upper(a), upper(b[n]), odd[n]));
        }
        memcpy(own, tiles.data[sums][m], sizeof own);
        for (int n = 0; n < kFloats; ++n) own[n] = flushed(flushed(even[n] + odd[n]) + flushed(own[n]));
        memcpy(tiles.data[sums][m], own, sizeof own);
    }
    ++products;
}

Counts take_counts() { return {products.exchange(0), loads.exchange(0), stores.exchange(0), configured.load()}; }

}  // namespace amx_on_cpu
