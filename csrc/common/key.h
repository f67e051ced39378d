// Which Philox key a sample has: a hash of its seed and of its place in the set that the seed names.
#pragma once
#include <stdint.h>

namespace fastsample {

// The finaliser of splitmix64 (Steele, Lea & Flood 2014), a bijection of 64-bit numbers.
inline uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

// Two places of one seed never share a key.
inline uint64_t sample_key(uint64_t seed, uint64_t place) { return mix(mix(seed) + place); }

}  // namespace fastsample
