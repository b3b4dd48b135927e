// The suite on rows with 0/1 errors, eight rows a word: what bootstrap.cpp measures most resamples with.
#pragma once

#include <array>

#include "stage1/machine.hpp"
#include "suite.hpp"

namespace stage1 {

inline constexpr std::uint64_t most_packed = most_rows / 32;  // rows of a resample whose products stay below 2^31
// Resamples whose weighted sums are taken together, so that the values are read once for all of them.
inline constexpr std::size_t batch = 4;

// Rows with 0/1 errors as the fast pass wants them: padded to whole blocks, masks instead of bits. Rows and suite must
// outlive it; fewer than most_packed rows.
class PackedRows {
  public:
    struct Scratch {
        Aligned<std::uint32_t> rows_before, errors_before;
    };

    PackedRows(const Rows<std::uint8_t>& rows, const Suite& suite);

    bool has_means() const { return !nll_.empty() || !brier_.empty(); }

    // Bytes of row counts that measure() reads: rows, then zeros.
    std::size_t padded() const;

    // The suite on one resample, NLL and Brier apart; false when its counts are too large and the general pass must do
    // it.
    bool measure(const std::uint8_t* counts, Scratch& scratch, std::span<double> out) const;

    // NLL and Brier of a batch of resamples; the row counts of each, and where their suites are.
    void means(const std::array<const std::uint8_t*, batch>& counts, std::span<double> out, std::size_t width) const;

  private:
    struct Pass;
    struct Group {
        std::uint32_t begin;
        std::uint32_t end;
    };

    std::size_t word_count() const;
    std::size_t end_of_tie(std::size_t row) const;
    double augrc_of(const std::uint8_t* counts, std::uint64_t pairs, std::uint64_t n) const;
    double area(const Pass& pass) const;
    static double tie_correction(const Pass& pass, const Group& group);
    double last_within(const Pass& pass, double target, std::size_t& stretches) const;
    template <class Within>
    double last_within_stretch(const Pass& pass, std::size_t first, std::size_t last, Within within) const;

    Rows<std::uint8_t> rows_;
    Suite suite_;
    std::size_t blocks_;
    Aligned<std::uint8_t> wrong_, positive_, missed_;
    Aligned<double> nll_, brier_;
    std::vector<Group> tied_, mixed_;
    std::vector<std::size_t> by_risk_;
};

}  // namespace stage1
