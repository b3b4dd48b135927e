// Counter-based random numbers: draw i of a stream needs no draw before it, so any order of work gives the same bits.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "stage1/machine.hpp"

namespace stage1 {

inline constexpr std::uint64_t golden = 0x9E3779B97F4A7C15U;

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
};

// Poisson(1 - 2.5 / sqrt(n)) as 16-bit codes and what they leave over; made by stage1_pro.native to 2^-64. A mean
// closer to one leaves fewer units to draw one by one, but more fills with too many (0.6% here).
//
// A code below cuts[k] (and at or above cuts[k - 1]) means k. Codes from cuts.back() on stand for the rest of the law:
// with 48 more bits they make a number below (2^16 - cuts.back()) 2^48, and it counts how many of `rest` it reaches.
struct CountTable {
    std::array<std::uint64_t, 6> cuts;
    std::array<std::uint64_t, 26> rest;
};

// Cumulated Poisson laws of the means (1 - 2.5 / sqrt(n)) 2^j, in units of 2^-64, of all j in one row: a word that
// reaches k of the numbers of law j, from starts[j] on, stands for lowest[j] + k.
struct PoissonTables {
    std::span<const std::uint64_t> reach;
    std::span<const std::uint32_t> starts;  // [laws + 1]
    std::span<const std::uint32_t> lowest;  // [laws]
};

// Resamples up to this size are drawn one by one: the Poisson mean would not be positive.
inline constexpr std::size_t smallest_poisson = 17;

// Units are drawn within each stratum: sizes[s] units of stratum s follow those of the strata before it.
struct Strata {
    std::span<const std::uint32_t> sizes;
    std::span<const CountTable> tables;  // one per stratum
};

// Writes how often each unit is in a resample that draws, within each stratum of n units, n of them with replacement:
// Multinomial(n, 1/n).
//
// Poisson counts of a mean a little below one, then uniform draws for what is missing; drawn anew when there are too
// many. Given their sum Poisson counts are multinomial, so the result is, exactly.   counts: [units], units < 2^31.
void draw_counts(const Stream& stream, const Strata& strata, std::span<std::uint8_t> counts);

// Resamples of n units that are told apart only by which cell they are in: how many draws fall into each cell.
class CellSampler {
  public:
    // sizes: units of each cell, at least 1, n in all; laws up to the largest size.
    CellSampler(std::span<const std::uint32_t> sizes, const PoissonTables& tables);

    // counts: [cells]. Multinomial(n, sizes / n): Poisson counts of each cell, by the binary digits of its size, then
    // uniform draws for what is missing.
    void draw(const Stream& stream, std::span<std::uint32_t> counts) const;

  private:
    std::uint32_t draw_poisson(std::size_t law, std::uint64_t word) const;

    std::span<const std::uint32_t> sizes_;
    PoissonTables tables_;
    std::uint64_t n_ = 0;
    std::vector<std::uint32_t> guides_;      // [laws, 256]: where the search for a word starts, by its first byte
    std::vector<std::uint32_t> cell_guide_;  // [n / 2^shift + 1]: the cell of the first unit of each run of 2^shift
    std::vector<std::uint32_t> ends_;        // [cells]
    unsigned shift_ = 0;
};

}  // namespace stage1
