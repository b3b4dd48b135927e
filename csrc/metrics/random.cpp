#include "stage1/random.hpp"

#include <algorithm>
#include <array>
#include <cstddef>

namespace stage1 {
namespace {

constexpr std::size_t block = 1024;  // words hashed at a time: 8 KiB stay in L1

STAGE1_CLONES void hash_words(const Stream stream, std::uint64_t first, std::uint64_t* words, std::size_t size) {
    for (std::size_t word = 0; word < size; ++word) {
        words[word] = mix(stream.key + stream.gamma * (first + word + 1));
    }
}

}  // namespace

void add_resample_counts(const Stream& stream, std::span<std::uint32_t> counts) {
    const std::uint64_t n = counts.size();
    const std::uint64_t limit = (std::uint64_t{1} << 32) % n;
    const auto take = [&](std::uint64_t bits, std::uint64_t draw) {
        std::uint64_t product = bits * n;
        for (std::uint64_t attempt = 1; (product & 0xFFFFFFFFU) < limit; ++attempt) {
            // A rejected draw has a stream of attempts of its own, so the others do not depend on it.
            product = (mix(mix(stream.key + attempt) + stream.gamma * draw) >> 32) * n;
        }
        ++counts[static_cast<std::size_t>(product >> 32)];
    };
    std::array<std::uint64_t, block> words;
    for (std::uint64_t first = 0; first < (n + 1) / 2; first += block) {
        const std::size_t size = static_cast<std::size_t>(std::min<std::uint64_t>(block, (n + 1) / 2 - first));
        hash_words(stream, first, words.data(), size);
        const std::size_t pairs = static_cast<std::size_t>(std::min<std::uint64_t>(size, n / 2 - first));
        for (std::size_t word = 0; word < pairs; ++word) {
            take(words[word] & 0xFFFFFFFFU, 2 * (first + word));
            take(words[word] >> 32, 2 * (first + word) + 1);
        }
        if (pairs < size) {
            take(words[pairs] & 0xFFFFFFFFU, n - 1);
        }
    }
}

}  // namespace stage1
