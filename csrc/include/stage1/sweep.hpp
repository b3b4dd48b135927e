// Counts at every distinct threshold, and the best pair of thresholds under two constraints.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <type_traits>

namespace stage1 {

// 0/1 errors are counted, losses in [0, 1] are summed, in sorted order.
template <class L>
using ErrorSum = std::conditional_t<std::same_as<L, double>, double, std::int64_t>;

// What is accepted at each threshold, from the highest down; all [M], the last four [0] where answers are not known.
template <class E>
struct SweepCounts {
    std::span<double> threshold;
    std::span<std::int64_t> accepted;
    std::span<E> errors;
    std::span<std::int64_t> positive;
    std::span<std::int64_t> false_negative;
    std::span<std::int64_t> negative;
    std::span<std::int64_t> false_positive;
};

// confidence, error: [N] as for sort_order, which gave order [N] and tie_ends [M].
// answer: [N] or empty; bit 0: the row is positive, bit 1: it is answered positive.
template <std::floating_point C, class L>
void count_accepted(std::span<const C> confidence, std::span<const L> error, std::span<const std::uint8_t> answer,
                    std::span<const std::uint32_t> order, std::span<const std::uint32_t> tie_ends,
                    const SweepCounts<ErrorSum<L>>& counts);

enum class Second : std::uint8_t { false_positive_rate, exit_error };

// A share in [0, 1). With denominators up to n, and n below 2^31, no comparison leaves 64 bits.
struct Share {
    std::int64_t numerator;
    std::int64_t denominator;
};

// The first `upper` tie groups exit as positive, those from `lower` on as negative; -1 and -1 when there is no such
// pair.
struct Cut {
    std::int64_t upper;
    std::int64_t lower;
};

struct DualCuts {
    Cut best;     // largest coverage within both constraints; then fewest wrong exits, then fewest missed positives
    Cut nearest;  // smallest FNR on exits within the second constraint; then largest coverage
};

// Exact, in O(M log M). For a fixed `lower`, FNR on exits falls as `upper` grows, so the largest `upper` that the
// second constraint allows decides. FPR allows a prefix, which shrinks as `lower` grows: two pointers. Exit error is
// monotone in neither, but splits into f N_i - e A_i <= e R_j - f FN_j: the largest such i <= j lies on a stack of
// suffix minima. A rate of no rows is undefined and does not meet its constraint.
//
// rows, positives: [M + 1], counts among the first 0..M tie groups in descending score.
DualCuts search_dual(std::span<const std::int64_t> rows, std::span<const std::int64_t> positives, Second second,
                     Share max_fnr, Share max_second);

}  // namespace stage1
