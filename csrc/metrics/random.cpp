#include "stage1/random.hpp"

#include <algorithm>
#include <array>
#include <cstddef>

namespace stage1 {
namespace {

constexpr std::size_t block = 2048;  // draws hashed at a time: two halves of 1024 words, small enough for L1

// products[j] = word j * n for draws first..first + 2 * words - 1; true if any of them must be drawn again.
STAGE1_CLONES bool fill(std::uint64_t key, std::uint64_t gamma, std::uint64_t first, std::uint64_t n,
                        std::uint64_t limit, std::uint64_t* products, std::size_t words) {
    std::uint64_t rejected = 0;
    for (std::size_t word = 0; word < words; ++word) {
        const std::uint64_t bits = mix(key + gamma * (first / 2 + word + 1));
        const std::uint64_t low = (bits & 0xFFFFFFFFU) * n;
        const std::uint64_t high = (bits >> 32) * n;
        products[2 * word] = low;
        products[2 * word + 1] = high;
        rejected |= static_cast<std::uint64_t>((low & 0xFFFFFFFFU) < limit);
        rejected |= static_cast<std::uint64_t>((high & 0xFFFFFFFFU) < limit);
    }
    return rejected != 0;
}

}  // namespace

void add_resample_counts(const Stream& stream, std::span<std::uint32_t> counts) {
    const std::uint64_t n = counts.size();
    const std::uint64_t limit = (std::uint64_t{1} << 32) % n;
    std::array<std::uint64_t, block> products;
    for (std::uint64_t first = 0; first < n; first += block) {
        const std::size_t draws = static_cast<std::size_t>(std::min<std::uint64_t>(block, n - first));
        if (fill(stream.key, stream.gamma, first, n, limit, products.data(), (draws + 1) / 2)) {
            for (std::size_t draw = 0; draw < draws; ++draw) {
                // A rejected draw has a stream of attempts of its own, so the others do not depend on it.
                for (std::uint64_t attempt = 1; (products[draw] & 0xFFFFFFFFU) < limit; ++attempt) {
                    const std::uint64_t bits = mix(mix(stream.key + attempt) + stream.gamma * (first + draw));
                    products[draw] = (bits >> 32) * n;
                }
            }
        }
        for (std::size_t draw = 0; draw < draws; ++draw) {
            ++counts[static_cast<std::size_t>(products[draw] >> 32)];
        }
    }
}

}  // namespace stage1
