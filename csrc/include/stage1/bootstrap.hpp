// AUGRC of rows sorted once, and of their resamples.
#pragma once

#include <concepts>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace stage1 {

// 0/1 errors are bytes and every sum is an exact integer; losses in [0, 1] are doubles, summed in sorted order.
template <class T>
concept Loss = std::same_as<T, std::uint8_t> || std::same_as<T, double>;

// Rows by descending confidence; within a tie group by cluster and loss, so the order of the input never matters.
template <Loss L>
struct SortedRows {
    std::vector<L> loss;                  // [N]
    std::vector<std::uint32_t> cluster;   // [N], or empty: every row is its own cluster
    std::vector<std::uint32_t> tie_ends;  // [M], one past the last row of each tie group
};

// confidence: [N], no NaN, 1 <= N < 2^31; float32 with 0/1 errors is sorted as packed 64-bit keys.
// loss: [N]; 0/1 as bytes, or doubles in [0, 1].   cluster: [N] or empty, each below 2^31.
template <std::floating_point C, Loss L>
SortedRows<L> sort_rows(std::span<const C> confidence, std::span<const L> loss, std::span<const std::uint32_t> cluster);

// Sum over tie groups g of C_g (2 E_before + E_g), over 2 n^2. With counts [N], row i is taken counts[i] times.
template <Loss L>
double augrc(const SortedRows<L>& rows);

// AUGRC of replicates.size() resamples of the rows, or of n_clusters whole clusters; stream b gives replicates[b],
// whatever the number of threads. Returns false when interrupted() stopped it (see parallel_for).
// Throws std::overflow_error when a resample of clusters reaches 2^31 rows.
template <Loss L>
bool bootstrap_augrc(const SortedRows<L>& rows, std::size_t n_clusters, std::uint64_t seed, unsigned threads,
                     std::span<double> replicates, const std::function<bool()>& interrupted);

}  // namespace stage1
