// Counter-based random numbers: draw i of a stream needs no draw before it, so any order of work gives the same bits.
#pragma once

#include <cstdint>
#include <span>

#include "stage1/machine.hpp"

namespace stage1 {

// SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
STAGE1_INLINE constexpr std::uint64_t mix(std::uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9U;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBU;
    return value ^ (value >> 31);
}

// One stream per (seed, replicate), each with a start and an odd increment of its own.
struct Stream {
    std::uint64_t key;
    std::uint64_t gamma;

    constexpr Stream(std::uint64_t seed, std::uint64_t replicate)
        : key(mix(mix(seed + golden) + golden * (replicate + 1))), gamma(mix(key ^ golden) | 1U) {}

    static constexpr std::uint64_t golden = 0x9E3779B97F4A7C15U;
};

// Adds to counts[u] how often unit u is among counts.size() uniform draws with replacement: exactly
// Multinomial(n, 1/n). Each draw is Lemire's multiplication with rejection on 32 bits, so no unit is favoured.
//
// counts: [n], 1 <= n < 2^32; zeroed by the caller.
void add_resample_counts(const Stream& stream, std::span<std::uint32_t> counts);

}  // namespace stage1
