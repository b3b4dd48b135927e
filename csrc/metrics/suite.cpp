// The suite by its definitions, for any loss and any counts; the oracle of packed.cpp.
#include "suite.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>

namespace stage1 {
namespace {

template <class L>
using SumOf = std::conditional_t<std::same_as<L, double>, double, std::uint64_t>;

// Tie group by tie group; take(row) is how often the row counts.
template <Loss L, class Take>
void measure(const Rows<L>& rows, const Suite& suite, Take take, std::span<double> out) {
    std::uint64_t total = 0;
    for (std::size_t row = 0; row < rows.loss.size(); ++row) {
        total += take(row);
    }
    if (total >= most_rows) {
        throw std::overflow_error("a resample of clusters reached 2^31 rows");
    }
    const double n = static_cast<double>(total);
    const bool whole = out.size() > 1;
    const auto at_coverage = whole ? out.subspan(fixed_columns, suite.coverages.size()) : std::span<double>{};
    const auto at_risk = whole ? out.subspan(fixed_columns + suite.coverages.size()) : std::span<double>{};
    std::fill(at_coverage.begin(), at_coverage.end(), nan);
    std::fill(at_risk.begin(), at_risk.end(), 0.0);

    SumOf<L> pairs{};
    SumOf<L> errors{};
    std::uint64_t accepted = 0;
    double area = 0;
    double risk = 0;
    double nll = 0;
    double brier = 0;
    double exited = 0;
    double exited_errors = 0;
    std::uint64_t positives = 0;
    std::uint64_t missed = 0;
    std::size_t row = 0;
    for (const std::uint32_t end : rows.tie_ends) {
        const SumOf<L> errors_before = errors;
        std::uint64_t group = 0;
        for (; row < end; ++row) {
            const std::uint64_t times = take(row);
            group += times;
            errors += static_cast<SumOf<L>>(times) * static_cast<SumOf<L>>(rows.loss[row]);
            if (!suite.nll.empty()) {
                nll += static_cast<double>(times) * suite.nll[row];
            }
            if (!suite.brier.empty()) {
                brier += static_cast<double>(times) * suite.brier[row];
            }
            if (row < suite.n_exit && !suite.kind.empty()) {
                positives += (suite.kind[row] & is_positive) != 0 ? times : 0;
                missed += (suite.kind[row] & is_missed) != 0 ? times : 0;
            }
        }
        pairs += static_cast<SumOf<L>>(group) * (errors_before + errors);
        if (row == suite.n_exit) {
            exited = static_cast<double>(accepted + group);
            exited_errors = static_cast<double>(errors);
        }
        if (!whole || group == 0) {
            continue;
        }
        const double now = static_cast<double>(errors) / static_cast<double>(accepted + group);
        area += static_cast<double>(group) * ((accepted == 0 ? now : risk) + now);
        risk = now;
        accepted += group;
        for (std::size_t k = 0; k < at_coverage.size(); ++k) {
            if (std::isnan(at_coverage[k]) &&
                static_cast<double>(accepted) >= suite.coverages[k] * n * (1 - rounding)) {
                at_coverage[k] = now;
            }
        }
        for (std::size_t k = 0; k < at_risk.size(); ++k) {
            if (static_cast<double>(errors) <= suite.risks[k] * static_cast<double>(accepted) * (1 + rounding)) {
                at_risk[k] = static_cast<double>(accepted) / n;
            }
        }
    }
    out[augrc_at] = static_cast<double>(pairs) / static_cast<double>(2 * total * total);
    if (whole) {
        out[aurc_at] = suite.curve ? area / (2 * n) : nan;
        out[accuracy_at] = (n - static_cast<double>(errors)) / n;
        out[nll_at] = suite.nll.empty() ? nan : nll / n;
        out[brier_at] = suite.brier.empty() ? nan : brier / n;
        out[coverage_at] = suite.exits ? exited / n : nan;
        out[exit_error_at] = suite.exits ? ratio(exited_errors, exited) : nan;
        out[fnr_at] = suite.exits && !suite.kind.empty()
                          ? ratio(static_cast<double>(missed), static_cast<double>(positives))
                          : nan;
    }
}

}  // namespace

template <Loss L>
double augrc(const Rows<L>& rows) {
    double value = 0;
    // A closure of its own, so that the compiler makes a pass of AUGRC alone.
    measure(rows, Suite{}, [](std::size_t) { return std::uint64_t{1}; }, {&value, 1});
    return value;
}

template <Loss L>
void measure(const Rows<L>& rows, const Suite& suite, std::span<double> out) {
    measure(rows, suite, [](std::size_t) { return std::uint64_t{1}; }, out);
}

template <Loss L>
void measure_counted(const Rows<L>& rows, const Suite& suite, std::span<const std::uint8_t> counts,
                     std::span<double> out) {
    measure(rows, suite, [=](std::size_t row) { return std::uint64_t{counts[row]}; }, out);
}

template <Loss L>
Moments augrc_influence(const Rows<L>& rows, std::size_t n_units, double value) {
    const double n = static_cast<double>(rows.loss.size());
    std::vector<double> of_unit(rows.unit.empty() ? 0 : n_units);
    Moments moments;
    double errors_before = 0;
    std::size_t row = 0;
    for (const std::uint32_t end : rows.tie_ends) {
        const std::size_t begin = row;
        double errors = 0;
        for (std::size_t tied = begin; tied < end; ++tied) {
            errors += static_cast<double>(rows.loss[tied]);
        }
        // What an accepted row pays for errors at or above it, and an error for the rows at or below it.
        const double as_row = 2 * errors_before + errors;
        const double as_error = 2 * (n - end) + static_cast<double>(end - begin);
        for (; row < end; ++row) {
            const double influence =
                (as_row + static_cast<double>(rows.loss[row]) * as_error) / (2 * n * n) - 2 * value / n;
            if (rows.unit.empty()) {
                moments.second += influence * influence;
                moments.third += influence * influence * influence;
            } else {
                of_unit[rows.unit[row]] += influence;
            }
        }
        errors_before += errors;
    }
    for (const double influence : of_unit) {
        moments.second += influence * influence;
        moments.third += influence * influence * influence;
    }
    return moments;
}

#define STAGE1_INSTANTIATE(L)                                                                                      \
    template double augrc(const Rows<L>&);                                                                         \
    template void measure(const Rows<L>&, const Suite&, std::span<double>);                                        \
    template void measure_counted(const Rows<L>&, const Suite&, std::span<const std::uint8_t>, std::span<double>); \
    template Moments augrc_influence(const Rows<L>&, std::size_t, double);
STAGE1_INSTANTIATE(std::uint8_t)
STAGE1_INSTANTIATE(double)
#undef STAGE1_INSTANTIATE

}  // namespace stage1
