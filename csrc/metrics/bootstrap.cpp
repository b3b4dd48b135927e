#include "stage1/bootstrap.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#include "stage1/machine.hpp"
#include "stage1/random.hpp"

namespace stage1 {
namespace {

template <class C>
using BitsOf = std::conditional_t<sizeof(C) == 4, std::uint32_t, std::uint64_t>;

// Bits that ascend as the confidence descends; -0 and 0 are one value.
template <std::floating_point C>
BitsOf<C> descending_bits(C value) {
    using Bits = BitsOf<C>;
    constexpr Bits sign = Bits{1} << (8 * sizeof(C) - 1);
    const Bits bits = std::bit_cast<Bits>(value + C{0});
    return (bits & sign) != 0 ? bits : static_cast<Bits>(~(bits | sign));
}

// Least significant byte first; a byte that all keys share costs no pass.
void radix_sort(std::vector<std::uint64_t>& keys) {
    std::vector<std::uint64_t> other(keys.size());
    std::array<std::array<std::size_t, 256>, 8> histogram{};
    for (const std::uint64_t key : keys) {
        for (unsigned byte = 0; byte < 8; ++byte) {
            ++histogram[byte][(key >> (8 * byte)) & 0xFFU];
        }
    }
    for (unsigned byte = 0; byte < 8; ++byte) {
        auto& starts = histogram[byte];
        if (starts[(keys.front() >> (8 * byte)) & 0xFFU] == keys.size()) {
            continue;
        }
        std::size_t total = 0;
        for (std::size_t& start : starts) {
            total += std::exchange(start, total);
        }
        for (const std::uint64_t key : keys) {
            other[starts[(key >> (8 * byte)) & 0xFFU]++] = key;
        }
        keys.swap(other);
    }
}

template <class L>
using SumOf = std::conditional_t<std::same_as<L, double>, double, std::uint64_t>;

// take(i) is how often row i counts. Integer sums stay below 2^63 while fewer than 2^31 rows count in all.
template <Loss L, class Take>
STAGE1_INLINE double evaluate(const SortedRows<L>& rows, Take take) {
    SumOf<L> pairs{};
    SumOf<L> errors{};
    std::uint64_t total = 0;
    std::uint32_t row = 0;
    for (const std::uint32_t end : rows.tie_ends) {
        const SumOf<L> errors_before = errors;
        std::uint64_t group = 0;
        for (; row < end; ++row) {
            const std::uint64_t times = take(row);
            group += times;
            errors += static_cast<SumOf<L>>(times) * static_cast<SumOf<L>>(rows.loss[row]);
        }
        total += group;
        pairs += static_cast<SumOf<L>>(group) * (errors_before + errors);
    }
    if (total >= std::uint64_t{1} << 31) {
        throw std::overflow_error("a resample of clusters reached 2^31 rows");
    }
    return static_cast<double>(pairs) / static_cast<double>(2 * total * total);
}

}  // namespace

template <std::floating_point C, Loss L>
SortedRows<L> sort_rows(std::span<const C> confidence, std::span<const L> loss,
                        std::span<const std::uint32_t> cluster) {
    const std::size_t n = confidence.size();
    const bool clustered = !cluster.empty();
    SortedRows<L> rows;
    rows.loss.resize(n);
    rows.cluster.resize(clustered ? n : 0);
    rows.tie_ends.reserve(n);
    const auto close_ties = [&](auto tied) {
        for (std::size_t row = 1; row < n; ++row) {
            if (!tied(row)) {
                rows.tie_ends.push_back(static_cast<std::uint32_t>(row));
            }
        }
        rows.tie_ends.push_back(static_cast<std::uint32_t>(n));
    };
    if constexpr (std::same_as<C, float> && std::same_as<L, std::uint8_t>) {
        // One key holds it all: 32 bits of confidence, 31 of cluster, 1 of error.
        std::vector<std::uint64_t> keys(n);
        for (std::size_t row = 0; row < n; ++row) {
            const std::uint64_t owner = clustered ? cluster[row] : 0;
            keys[row] = std::uint64_t{descending_bits(confidence[row])} << 32 | owner << 1 | loss[row];
        }
        radix_sort(keys);
        for (std::size_t row = 0; row < n; ++row) {
            rows.loss[row] = static_cast<std::uint8_t>(keys[row] & 1U);
            if (clustered) {
                rows.cluster[row] = static_cast<std::uint32_t>(keys[row]) >> 1;
            }
        }
        close_ties([&](std::size_t row) { return keys[row] >> 32 == keys[row - 1] >> 32; });
    } else {
        // Float64 confidences that would collide in float32 must not become ties, so the key is a whole record.
        using Record = std::tuple<std::uint64_t, std::uint32_t, L>;
        std::vector<Record> records(n);
        for (std::size_t row = 0; row < n; ++row) {
            records[row] = {descending_bits(confidence[row]), clustered ? cluster[row] : 0, loss[row]};
        }
        std::sort(records.begin(), records.end());
        for (std::size_t row = 0; row < n; ++row) {
            rows.loss[row] = std::get<2>(records[row]);
            if (clustered) {
                rows.cluster[row] = std::get<1>(records[row]);
            }
        }
        close_ties([&](std::size_t row) { return std::get<0>(records[row]) == std::get<0>(records[row - 1]); });
    }
    return rows;
}

template <Loss L>
double augrc(const SortedRows<L>& rows) {
    return evaluate(rows, [](std::uint32_t) { return std::uint64_t{1}; });
}

template <Loss L>
bool bootstrap_augrc(const SortedRows<L>& rows, std::size_t n_clusters, std::uint64_t seed, unsigned threads,
                     std::span<double> replicates, const std::function<bool()>& interrupted) {
    const std::size_t units = n_clusters != 0 ? n_clusters : rows.loss.size();
    const auto make_work = [&]() -> std::function<void(std::size_t)> {
        const auto counts = std::make_shared<std::vector<std::uint32_t>>(units);
        return [&, counts](std::size_t replicate) {
            std::fill(counts->begin(), counts->end(), 0U);
            add_resample_counts(Stream(seed, replicate), *counts);
            const std::uint32_t* times = counts->data();
            const std::uint32_t* owner = rows.cluster.data();
            replicates[replicate] = n_clusters != 0
                                        ? evaluate(rows, [=](std::uint32_t row) { return times[owner[row]]; })
                                        : evaluate(rows, [=](std::uint32_t row) { return times[row]; });
        };
    };
    return parallel_for(replicates.size(), threads, make_work, interrupted);
}

#define STAGE1_INSTANTIATE(L)                                                                                      \
    template SortedRows<L> sort_rows(std::span<const float>, std::span<const L>, std::span<const std::uint32_t>);  \
    template SortedRows<L> sort_rows(std::span<const double>, std::span<const L>, std::span<const std::uint32_t>); \
    template double augrc(const SortedRows<L>&);                                                                   \
    template bool bootstrap_augrc(const SortedRows<L>&, std::size_t, std::uint64_t, unsigned, std::span<double>,   \
                                  const std::function<bool()>&);
STAGE1_INSTANTIATE(std::uint8_t)
STAGE1_INSTANTIATE(double)
#undef STAGE1_INSTANTIATE

}  // namespace stage1
