// The order of confidences as integers; for sort.cpp and order.cpp.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include "stage1/machine.hpp"

namespace stage1 {

// Bits that ascend as the confidence descends; -0 and 0 are one value.
template <std::floating_point C>
STAGE1_INLINE std::uint64_t descending_bits(C value) {
    using Bits = std::conditional_t<sizeof(C) == 4, std::uint32_t, std::uint64_t>;
    constexpr Bits sign = Bits{1} << (8 * sizeof(C) - 1);
    const Bits bits = std::bit_cast<Bits>(value + C{0});
    return (bits & sign) != 0 ? bits : static_cast<Bits>(~(bits | sign));
}

}  // namespace stage1
