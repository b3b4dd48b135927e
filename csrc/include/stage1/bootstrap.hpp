// Selective metrics of rows sorted once, and of their resamples: one pass over the counts gives the whole suite.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "stage1/random.hpp"

namespace stage1 {

// 0/1 errors are bytes and every sum of them is an exact integer; losses in [0, 1] are doubles, summed in sorted order.
template <class T>
concept Loss = std::same_as<T, std::uint8_t> || std::same_as<T, double>;

// Rows by descending confidence, then ascending loss; N < 2^31.
template <Loss L>
struct Rows {
    std::span<const L> loss;                  // [N]
    std::span<const std::uint32_t> tie_ends;  // [M], one past the last row of each tie group
    std::span<const std::uint32_t> unit;      // [N] which unit a row is drawn with, or empty: row i is unit i
};

// What is measured. All spans may be empty; what cannot be measured then is NaN.
struct Suite {
    std::span<const double> coverages;   // targets of Risk@Coverage, in (0, 1]
    std::span<const double> risks;       // targets of Coverage@Risk, in [0, 1]
    std::span<const double> nll, brier;  // [N] of each row
    std::span<const std::uint8_t> kind;  // [N]: is_positive | is_missed
    std::size_t n_exit = 0;              // rows at or above the threshold
    bool curve = false;                  // whether AURC is wanted
    bool exits = false;                  // whether there is a threshold
};
inline constexpr std::uint8_t is_positive = 1;  // of the positive class
inline constexpr std::uint8_t is_missed = 2;    // positive, and answered otherwise

// Columns of a replicate; Risk@Coverage and Coverage@Risk follow in the order of their targets.
enum Column : std::size_t { augrc_at, aurc_at, accuracy_at, nll_at, brier_at, coverage_at, exit_error_at, fnr_at };
inline constexpr std::size_t fixed_columns = 8;

// Owns what Rows looks at.
template <Loss L>
struct SortedRows {
    std::vector<L> loss;
    std::vector<std::uint32_t> unit;
    std::vector<std::uint32_t> tie_ends;

    Rows<L> view() const { return {loss, tie_ends, unit}; }
};

// confidence: [N], no NaN; float32 with 0/1 errors is sorted as packed 64-bit keys.   unit: [N] or empty, below 2^31.
// Within tie groups rows are ordered by loss and unit, so the order of the input never matters.
template <std::floating_point C, Loss L>
SortedRows<L> sort_rows(std::span<const C> confidence, std::span<const L> loss, std::span<const std::uint32_t> unit);

// Sum over tie groups g of C_g (2 E_before + E_g), over 2 n^2.
template <Loss L>
double augrc(const Rows<L>& rows);

// The suite on the rows themselves: out is [fixed_columns and the targets], or [1] for AUGRC alone.
template <Loss L>
void measure(const Rows<L>& rows, const Suite& suite, std::span<double> out);

// Sums over the units of squares and cubes of their influence on AUGRC: its derivative along their rows' weights. The
// root of the first is AUGRC's standard error; both make the acceleration of BCa.
struct Moments {
    double second = 0;
    double third = 0;
};
template <Loss L>
Moments augrc_influence(const Rows<L>& rows, std::size_t n_units, double augrc);

// The suite on every resample: out is [replicates, width], width = 1 (AUGRC alone) or fixed_columns and the targets.
// Stream b gives replicate b, whatever the number of threads. False when interrupted() stopped it (see parallel_for).
// Throws std::overflow_error when a resample of clusters reaches 2^31 rows.
template <Loss L>
bool bootstrap(const Rows<L>& rows, const Suite& suite, const Strata& strata, std::uint64_t seed, unsigned threads,
               std::size_t replicates, std::span<double> out, const std::function<bool()>& interrupted);

// AUGRC of resampled rows with few errors: runs of right and of wrong rows count as cells, so the work is one of cells
// and not of rows. Other draws than bootstrap() makes, from the same law.   out: [replicates].
bool bootstrap_augrc_of_cells(const Rows<std::uint8_t>& rows, const PoissonTables& tables, std::uint64_t seed,
                              unsigned threads, std::span<double> out, const std::function<bool()>& interrupted);

}  // namespace stage1
