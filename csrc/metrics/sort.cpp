// Rows by descending confidence, then loss, then unit: float32 with 0/1 errors as packed keys, the rest by order.cpp.
#include <algorithm>
#include <array>
#include <utility>

#include "bits.hpp"
#include "stage1/bootstrap.hpp"
#include "stage1/order.hpp"

namespace stage1 {
namespace {

// Digits of 11 bits, least significant first; one that all keys share costs no pass. The upper three are confidence and
// error, the lower ones the unit.
void radix_sort(std::vector<std::uint64_t>& keys) {
    constexpr unsigned digit_bits = 11;
    constexpr std::uint64_t digit_mask = (std::uint64_t{1} << digit_bits) - 1;
    constexpr std::array<unsigned, 6> shifts{0, 9, 20, 31, 42, 53};
    std::uint64_t varies = 0;
    for (const std::uint64_t key : keys) {
        varies |= key ^ keys.front();
    }
    std::vector<std::uint64_t> other(keys.size());
    std::vector<std::uint32_t> starts(shifts.size() << digit_bits);
    const auto digit = [](std::uint64_t key, unsigned shift) { return (key >> shift) & digit_mask; };
    std::array<unsigned, shifts.size()> used{};
    std::size_t n_used = 0;
    for (const unsigned shift : shifts) {
        if (digit(varies, shift) != 0) {
            used[n_used++] = shift;
        }
    }
    for (const std::uint64_t key : keys) {
        for (std::size_t d = 0; d < n_used; ++d) {
            ++starts[d << digit_bits | digit(key, used[d])];
        }
    }
    for (std::size_t d = 0; d < n_used; ++d) {
        const std::span<std::uint32_t> of_digit = std::span(starts).subspan(d << digit_bits, digit_mask + 1);
        std::uint32_t total = 0;
        for (std::uint32_t& start : of_digit) {
            total += std::exchange(start, total);
        }
        for (const std::uint64_t key : keys) {
            other[of_digit[digit(key, used[d])]++] = key;
        }
        keys.swap(other);
    }
}

}  // namespace

template <std::floating_point C, Loss L>
SortedRows<L> sort_rows(std::span<const C> confidence, std::span<const L> loss, std::span<const std::uint32_t> unit) {
    const std::size_t n = confidence.size();
    const bool clustered = !unit.empty();
    SortedRows<L> rows;
    rows.loss.resize(n);
    rows.unit.resize(clustered ? n : 0);
    if constexpr (std::same_as<C, float> && std::same_as<L, std::uint8_t>) {
        // One key holds it all: 32 bits of confidence, 1 of error, 31 of unit.
        std::vector<std::uint64_t> keys(n);
        for (std::size_t row = 0; row < n; ++row) {
            keys[row] = descending_bits(confidence[row]) << 32 | std::uint64_t{loss[row]} << 31;
        }
        for (std::size_t row = 0; clustered && row < n; ++row) {
            keys[row] |= unit[row];
        }
        radix_sort(keys);
        for (std::size_t row = 0; row < n; ++row) {
            rows.loss[row] = static_cast<std::uint8_t>((keys[row] >> 31) & 1U);
            if (clustered) {
                rows.unit[row] = static_cast<std::uint32_t>(keys[row] & 0x7FFFFFFFU);
            }
        }
        rows.tie_ends.reserve(n);
        for (std::size_t row = 1; row < n; ++row) {
            if (keys[row] >> 32 != keys[row - 1] >> 32) {
                rows.tie_ends.push_back(static_cast<std::uint32_t>(row));
            }
        }
        rows.tie_ends.push_back(static_cast<std::uint32_t>(n));
    } else {
        // Float64 confidences that would collide in float32 must not become ties.
        std::vector<std::uint32_t> order(n);
        rows.tie_ends.resize(n);
        rows.tie_ends.resize(sort_order(confidence, loss, std::span(order), std::span(rows.tie_ends)));
        if (clustered) {
            std::size_t begin = 0;
            for (const std::uint32_t end : rows.tie_ends) {
                std::sort(order.begin() + static_cast<std::ptrdiff_t>(begin),
                          order.begin() + static_cast<std::ptrdiff_t>(end), [&](std::uint32_t a, std::uint32_t b) {
                              return std::pair{loss[a], unit[a]} < std::pair{loss[b], unit[b]};
                          });
                begin = end;
            }
        }
        for (std::size_t row = 0; row < n; ++row) {
            rows.loss[row] = loss[order[row]];
            if (clustered) {
                rows.unit[row] = unit[order[row]];
            }
        }
    }
    return rows;
}

template SortedRows<std::uint8_t> sort_rows(std::span<const float>, std::span<const std::uint8_t>,
                                            std::span<const std::uint32_t>);
template SortedRows<std::uint8_t> sort_rows(std::span<const double>, std::span<const std::uint8_t>,
                                            std::span<const std::uint32_t>);
template SortedRows<double> sort_rows(std::span<const float>, std::span<const double>, std::span<const std::uint32_t>);
template SortedRows<double> sort_rows(std::span<const double>, std::span<const double>, std::span<const std::uint32_t>);

}  // namespace stage1
