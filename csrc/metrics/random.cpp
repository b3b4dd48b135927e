#include "stage1/random.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstring>
#include <functional>
#include <numeric>

namespace stage1 {
namespace {

constexpr std::size_t draw_block = 1024;  // rows at a time: their words, codes and counts stay in L1

constexpr std::size_t chunk = 64;         // rows whose flags are told apart
constexpr std::uint8_t of_the_rest = 16;  // above every count that a code gives; eight of them fit a byte
constexpr std::uint64_t each = 0x0101010101010101U;

struct alignas(64) Block {
    std::array<std::uint16_t, draw_block> codes;
    std::array<std::uint64_t, draw_block / chunk> open;  // not zero: some are of_the_rest
    std::uint32_t sum;
};

// Counts of one block from its 16-bit codes, `of_the_rest` where these leave it open.
STAGE1_CLONES void fill_block(std::uint64_t key, std::uint64_t gamma, std::uint64_t first_word,
                              const std::array<std::uint64_t, 6>& cuts, Block& out, std::uint8_t* counts) {
    std::array<std::uint64_t, draw_block / 4> words;
    for (std::size_t word = 0; word < words.size(); ++word) {
        words[word] = mix(key + gamma * (first_word + word + 1));
    }
    std::memcpy(out.codes.data(), words.data(), sizeof(words));
    std::array<std::uint16_t, 6> cut;
    std::copy(cuts.begin(), cuts.end(), cut.begin());
    for (std::size_t row = 0; row < draw_block; ++row) {
        const std::uint16_t code = out.codes[row];
        std::uint16_t count = 0;
        for (std::size_t k = 0; k < 5; ++k) {
            count = code >= cut[k] ? static_cast<std::uint16_t>(count + 1) : count;
        }
        counts[row] = static_cast<std::uint8_t>(code >= cut[5] ? of_the_rest : count);
    }
    // Eight counts a word; their sum is the highest byte of the word times 0x01…01.
    std::array<std::uint64_t, draw_block / 8> eights;
    std::memcpy(eights.data(), counts, draw_block);
    std::uint64_t sum = 0;
    for (const std::uint64_t eight : eights) {
        sum += (eight * each) >> 56;
    }
    out.sum = static_cast<std::uint32_t>(sum);
    for (std::size_t c = 0; c < out.open.size(); ++c) {
        out.open[c] = 0;
        for (std::size_t word = c * chunk / 8; word < (c + 1) * chunk / 8; ++word) {
            out.open[c] |= eights[word] & (each * of_the_rest);
        }
    }
}

// Settles the counts that the codes left open, from 48 more bits each.
void fill_rest(std::uint64_t key, std::uint64_t gamma, std::size_t first, const CountTable& table, Block& block,
               std::uint8_t* counts) {
    for (std::size_t word = 0; word < draw_block; word += 8) {
        if (block.open[word / chunk] == 0) {
            word += chunk - 8;
            continue;
        }
        std::uint64_t eight;
        std::memcpy(&eight, counts + word, sizeof(eight));
        for (eight &= each * of_the_rest; eight != 0; eight &= eight - 1) {
            const std::size_t row = word + static_cast<std::size_t>(std::countr_zero(eight)) / 8;
            const std::uint64_t low = mix(key + gamma * (first + row + 1)) >> 16;
            const std::uint64_t value = (block.codes[row] - table.cuts.back()) << 48 | low;
            const auto reached = std::upper_bound(table.rest.begin(), table.rest.end(), value);
            counts[row] = static_cast<std::uint8_t>(reached - table.rest.begin());
            block.sum += counts[row] - std::uint32_t{of_the_rest};
        }
    }
}

// Poisson counts of all units; gives their sum, which may pass n.
std::uint64_t fill_poisson(std::uint64_t key, std::uint64_t gamma, const CountTable& table,
                           std::span<std::uint8_t> counts) {
    Block block;
    std::uint64_t total = 0;
    const auto fill = [&](std::size_t first, std::uint8_t* to) {
        fill_block(key, gamma, first / 4, table.cuts, block, to);
        fill_rest(mix(key + 1), gamma, first, table, block, to);
        total += block.sum;
    };
    const std::size_t whole = counts.size() - counts.size() % draw_block;
    for (std::size_t first = 0; first < whole; first += draw_block) {
        fill(first, counts.data() + first);
    }
    if (whole < counts.size()) {
        alignas(64) std::array<std::uint8_t, draw_block> last;
        fill(whole, last.data());
        const auto end = last.begin() + static_cast<std::ptrdiff_t>(counts.size() - whole);
        std::copy(last.begin(), end, counts.begin() + static_cast<std::ptrdiff_t>(whole));
        total = std::accumulate(end, last.end(), total, std::minus<>{});
    }
    return total;
}

STAGE1_CLONES void hash_words(std::uint64_t key, std::uint64_t gamma, std::uint64_t first,
                              std::array<std::uint64_t, 128>& words) {
    for (std::size_t word = 0; word < words.size(); ++word) {
        words[word] = mix(key + gamma * (first + word + 1));
    }
}

// Calls take(unit) for uniform draws out of n units; stops when it returns false.
template <class Take>
bool draw_uniform(std::uint64_t key, std::uint64_t gamma, std::uint64_t draws, std::uint64_t n, Take take) {
    const std::uint64_t limit = (std::uint64_t{1} << 32) % n;
    std::array<std::uint64_t, 128> words;
    for (std::uint64_t first = 0; first < draws; first += words.size()) {
        hash_words(key, gamma, first, words);
        const std::uint64_t last = std::min<std::uint64_t>(draws, first + words.size());
        for (std::uint64_t draw = first; draw < last; ++draw) {
            // Lemire's multiplication with rejection on 32 bits. A rejected draw has attempts of its own, so the others
            // do not depend on it.
            std::uint64_t product = (words[draw - first] >> 32) * n;
            for (std::uint64_t attempt = 1; (product & 0xFFFFFFFFU) < limit; ++attempt) {
                product = (mix(mix(key + attempt) + gamma * (draw + 1)) >> 32) * n;
            }
            if (!take(static_cast<std::size_t>(product >> 32))) {
                return false;
            }
        }
    }
    return true;
}

// Counts of one stratum.
void draw_stratum(std::uint64_t base, std::uint64_t gamma, const CountTable& table, std::span<std::uint8_t> counts) {
    const std::uint64_t n = counts.size();
    for (std::uint64_t attempt = 1;; ++attempt) {
        const std::uint64_t key = mix(base + golden * attempt);
        std::uint64_t drawn = 0;
        if (n < smallest_poisson) {
            std::fill(counts.begin(), counts.end(), std::uint8_t{0});
        } else {
            drawn = fill_poisson(key, gamma, table, counts);
        }
        // A count that passes 255 is drawn anew; no resample that can be met has one.
        if (drawn <= n &&
            draw_uniform(mix(key + 2), gamma, n - drawn, n, [&](std::size_t unit) { return ++counts[unit] != 0; })) {
            return;
        }
    }
}

}  // namespace

void draw_counts(const Stream& stream, const Strata& strata, std::span<std::uint8_t> counts) {
    std::size_t first = 0;
    for (std::size_t s = 0; s < strata.sizes.size(); ++s) {
        draw_stratum(mix(stream.key + golden * (s + 1)), stream.gamma, strata.tables[s],
                     counts.subspan(first, strata.sizes[s]));
        first += strata.sizes[s];
    }
}

CellSampler::CellSampler(std::span<const std::uint32_t> sizes, const PoissonTables& tables)
    : sizes_(sizes), tables_(tables), guides_(tables.lowest.size() * 256) {
    for (std::size_t law = 0; law < tables_.lowest.size(); ++law) {
        std::uint32_t reached = tables_.starts[law];
        for (std::uint64_t byte = 0; byte < 256; ++byte) {
            while (reached < tables_.starts[law + 1] && tables_.reach[reached] <= byte << 56) {
                ++reached;
            }
            guides_[law * 256 + byte] = reached;
        }
    }
    for (const std::uint32_t size : sizes_) {
        n_ += size;
        ends_.push_back(static_cast<std::uint32_t>(n_));
    }
    // About one run of units per cell.
    shift_ = static_cast<unsigned>(std::bit_width(n_ / sizes_.size()));
    std::uint32_t cell = 0;
    for (std::uint64_t unit = 0; unit < n_; unit += std::uint64_t{1} << shift_) {
        while (ends_[cell] <= unit) {
            ++cell;
        }
        cell_guide_.push_back(cell);
    }
}

std::uint32_t CellSampler::draw_poisson(std::size_t law, std::uint64_t word) const {
    std::uint32_t reached = guides_[law * 256 + (word >> 56)];
    while (reached < tables_.starts[law + 1] && word >= tables_.reach[reached]) {
        ++reached;
    }
    return tables_.lowest[law] + reached - tables_.starts[law];
}

void CellSampler::draw(const Stream& stream, std::span<std::uint32_t> counts) const {
    const std::uint64_t base = mix(stream.key + golden);
    for (std::uint64_t attempt = 1;; ++attempt) {
        const std::uint64_t key = mix(base + golden * attempt);
        std::uint64_t drawn = 0;
        for (std::size_t cell = 0; cell < sizes_.size(); ++cell) {
            std::uint32_t count = 0;
            for (std::uint32_t digits = sizes_[cell]; digits != 0; digits &= digits - 1) {
                const auto law = static_cast<std::size_t>(std::countr_zero(digits));
                count += draw_poisson(law, mix(key + stream.gamma * (32 * cell + law + 1)));
            }
            counts[cell] = count;
            drawn += count;
        }
        if (drawn <= n_) {
            draw_uniform(mix(key + 2), stream.gamma, n_ - drawn, n_, [&](std::size_t unit) {
                std::uint32_t cell = cell_guide_[unit >> shift_];
                while (ends_[cell] <= unit) {
                    ++cell;
                }
                ++counts[cell];
                return true;
            });
            return;
        }
    }
}

}  // namespace stage1
