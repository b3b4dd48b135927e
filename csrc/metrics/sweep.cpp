#include "stage1/sweep.hpp"

#include <algorithm>
#include <cstddef>
#include <tuple>
#include <vector>

namespace stage1 {
namespace {

// Every row writes the counts of its group, and the last one of a group stands: nothing predicts where ties end.
template <bool answers, class C, class L>
void count(const C* confidence, const L* error, const std::uint8_t* answer, std::span<const std::uint32_t> order,
           const std::uint32_t* tie_ends, const SweepCounts<ErrorSum<L>>& counts) {
    ErrorSum<L> errors{};
    std::int64_t positive = 0;
    std::int64_t false_negative = 0;
    std::int64_t false_positive = 0;
    std::size_t group = 0;
    const std::size_t n = order.size();
    for (std::size_t place = 0; place < n; ++place) {
        const std::uint32_t row = order[place];
        const auto accepted = static_cast<std::int64_t>(place) + 1;
        errors += error[row];
        counts.threshold[group] = static_cast<double>(confidence[row]) + 0.0;
        counts.accepted[group] = accepted;
        counts.errors[group] = errors;
        if constexpr (answers) {
            const std::int64_t is_positive = answer[row] & 1;
            const std::int64_t said_positive = answer[row] >> 1;
            positive += is_positive;
            false_negative += is_positive & ~said_positive;
            false_positive += said_positive & ~is_positive;
            counts.positive[group] = positive;
            counts.false_negative[group] = false_negative;
            counts.negative[group] = accepted - positive;
            counts.false_positive[group] = false_positive;
        }
        group += tie_ends[group] == place + 1;
    }
}

}  // namespace

template <std::floating_point C, class L>
void count_accepted(std::span<const C> confidence, std::span<const L> error, std::span<const std::uint8_t> answer,
                    std::span<const std::uint32_t> order, std::span<const std::uint32_t> tie_ends,
                    const SweepCounts<ErrorSum<L>>& counts) {
    const auto run = answer.empty() ? count<false, C, L> : count<true, C, L>;
    run(confidence.data(), error.data(), answer.data(), order, tie_ends.data(), counts);
}

DualCuts search_dual(std::span<const std::int64_t> rows, std::span<const std::int64_t> positives, Second second,
                     Share max_fnr, Share max_second) {
    const std::size_t groups = rows.size() - 1;
    const std::int64_t n = rows[groups];
    const std::int64_t all_positive = positives[groups];
    const auto [e, f] = max_second;
    const auto excess = [&](std::size_t i) { return f * (rows[i] - positives[i]) - e * rows[i]; };
    std::vector<std::size_t> minima;  // indices of growing excess: each is the last with so little
    if (second == Second::exit_error) {
        minima.reserve(groups + 1);
    }
    DualCuts cuts{{-1, -1}, {-1, -1}};
    std::tuple<std::int64_t, std::int64_t, std::int64_t> best{0, 0, 0};  // exited, -wrong, -missed
    std::int64_t nearest_missed = 0;
    std::int64_t nearest_positive = 0;
    std::int64_t nearest_exited = 0;
    std::size_t allowed = groups;  // largest i within max FPR; falls as j grows
    for (std::size_t j = 0; j <= groups; ++j) {
        const std::int64_t missed = all_positive - positives[j];
        const std::int64_t exited_below = n - rows[j];
        std::size_t i = 0;
        if (second == Second::exit_error) {
            while (!minima.empty() && excess(minima.back()) >= excess(j)) {
                minima.pop_back();
            }
            minima.push_back(j);
            const std::int64_t room = e * exited_below - f * missed;
            const auto beyond = std::partition_point(minima.begin(), minima.end(),
                                                     [&](std::size_t index) { return excess(index) <= room; });
            if (beyond == minima.begin()) {
                continue;
            }
            i = *(beyond - 1);
        } else {
            const std::int64_t right = exited_below - missed;
            if (right == 0) {
                break;  // here and beyond, FPR is undefined or 1
            }
            while ((f - e) * (rows[allowed] - positives[allowed]) > e * right) {
                --allowed;
            }
            i = std::min(allowed, j);
        }
        const std::int64_t found = positives[i];
        const std::int64_t exited_positive = found + missed;
        if (exited_positive == 0) {
            continue;
        }
        const std::int64_t exited = rows[i] + exited_below;
        const std::int64_t wrong = rows[i] - found + missed;
        const Cut cut{static_cast<std::int64_t>(i), static_cast<std::int64_t>(j)};
        const std::int64_t left = missed * nearest_positive;
        const std::int64_t right = nearest_missed * exited_positive;
        if (cuts.nearest.upper < 0 || left < right || (left == right && exited >= nearest_exited)) {
            cuts.nearest = cut;
            nearest_missed = missed;
            nearest_positive = exited_positive;
            nearest_exited = exited;
        }
        const std::tuple candidate{exited, -wrong, -missed};
        if (missed * max_fnr.denominator <= max_fnr.numerator * exited_positive &&
            (cuts.best.upper < 0 || candidate >= best)) {
            cuts.best = cut;
            best = candidate;
        }
    }
    return cuts;
}

#define STAGE1_INSTANTIATE(C, L)                                                                        \
    template void count_accepted(std::span<const C>, std::span<const L>, std::span<const std::uint8_t>, \
                                 std::span<const std::uint32_t>, std::span<const std::uint32_t>,        \
                                 const SweepCounts<ErrorSum<L>>&);
STAGE1_INSTANTIATE(float, std::uint8_t)
STAGE1_INSTANTIATE(float, double)
STAGE1_INSTANTIATE(double, std::uint8_t)
STAGE1_INSTANTIATE(double, double)
#undef STAGE1_INSTANTIATE

}  // namespace stage1
