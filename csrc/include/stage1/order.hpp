// The order every selective metric needs: surest first, tie groups marked.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

namespace stage1 {

// Sorts rows by descending confidence, then ascending error, then index, and returns the number M of tie groups.
// A radix sort on order-preserving bits: only bits in which rows differ cost a pass. -0 and 0 are one value.
//
// confidence: [N], no NaN, infinities allowed, 1 <= N < 2^31.   error: [N]; 0/1 as bytes, or doubles in [0, 1].
// order: [N], row numbers.   tie_ends: [N], of which [M] are written: one past the last place of each tie group.
template <std::floating_point C, class L>
    requires std::same_as<L, std::uint8_t> || std::same_as<L, double>
std::size_t sort_order(std::span<const C> confidence, std::span<const L> error, std::span<std::uint32_t> order,
                       std::span<std::uint32_t> tie_ends);

}  // namespace stage1
