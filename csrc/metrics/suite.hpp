// What the two ways to measure the suite share: by definition (suite.cpp), and packed for 0/1 errors (packed.cpp).
#pragma once

#include <limits>

#include "stage1/bootstrap.hpp"

namespace stage1 {

inline constexpr double nan = std::numeric_limits<double>::quiet_NaN();
// Shares that differ by rounding alone are the same share: 0.07 of 100 rows is 7 rows.
inline constexpr double rounding = 1e-12;
inline constexpr std::uint64_t most_rows = std::uint64_t{1} << 31;

inline double ratio(double part, double whole) { return whole > 0 ? part / whole : nan; }

// The suite on rows that count counts[row] times, [N]; out as in measure(). Any loss, any count up to 255.
// Throws std::overflow_error at 2^31 rows.
template <Loss L>
void measure_counted(const Rows<L>& rows, const Suite& suite, std::span<const std::uint8_t> counts,
                     std::span<double> out);

}  // namespace stage1
