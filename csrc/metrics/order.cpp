#include "stage1/order.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <utility>

#include "bits.hpp"
#include "stage1/machine.hpp"

namespace stage1 {
namespace {

// Measured against 11 and 12 bits: 256 places written to at a time stay in the TLB, which pays for the pass more.
constexpr unsigned digit_bits = 8;
constexpr std::size_t digit_values = std::size_t{1} << digit_bits;
constexpr unsigned max_passes = (32 + digit_bits - 1) / digit_bits;
constexpr std::size_t small = 32;  // below this an insertion sort beats the counters

// Sorts records by their upper 32 bits, of which the lowest `width` differ; least significant digit first, stable.
// Returns where the result lies: from or to.
std::uint64_t* radix_sort(std::uint64_t* from, std::uint64_t* to, std::size_t size, unsigned width) {
    const unsigned passes = (width + digit_bits - 1) / digit_bits;
    const unsigned bits = (width + passes - 1) / passes;
    const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
    std::array<std::array<std::uint32_t, digit_values>, max_passes> histogram;
    for (unsigned pass = 0; pass < passes; ++pass) {
        std::fill_n(histogram[pass].begin(), std::size_t{1} << bits, 0U);
    }
    for (std::size_t place = 0; place < size; ++place) {
        std::uint64_t key = from[place] >> 32;
        for (unsigned pass = 0; pass < passes; ++pass, key >>= bits) {
            ++histogram[pass][key & mask];
        }
    }
    for (unsigned pass = 0; pass < passes; ++pass) {
        std::uint32_t* const starts = histogram[pass].data();
        std::uint32_t total = 0;
        for (std::size_t digit = 0; digit <= mask; ++digit) {
            total += std::exchange(starts[digit], total);
        }
        const unsigned shift = 32 + pass * bits;
        for (std::size_t place = 0; place < size; ++place) {
            const std::uint64_t record = from[place];
            to[starts[(record >> shift) & mask]++] = record;
        }
        std::swap(from, to);
    }
    return from;
}

// Closes runs by writing where they end.
struct Mark {
    std::uint32_t* ends;
    std::size_t* groups;

    void operator()(std::size_t, std::size_t end) const { ends[(*groups)++] = static_cast<std::uint32_t>(end); }

    // All runs of records that need no more sorting; without a branch, since nothing predicts ties.
    void all(const std::uint64_t* records, std::size_t first, std::size_t last) const {
        std::size_t count = *groups;
        for (std::size_t place = first + 1; place < last; ++place) {
            ends[count] = static_cast<std::uint32_t>(place);
            count += records[place] >> 32 != records[place - 1] >> 32;
        }
        ends[count++] = static_cast<std::uint32_t>(last);
        *groups = count;
    }
};

class Sorter {
  public:
    explicit Sorter(std::span<std::uint32_t> order)
        : order_(order.data()),
          records_(std::make_unique_for_overwrite<std::uint64_t[]>(2 * order.size())),
          from_(records_.get()),
          to_(records_.get() + order.size()) {}

    // Sorts places [first, last) of the order by key(row), stably, and calls close(first, last) for each run of equal
    // keys, from the smallest up. Keys that differ in more than 32 bits are sorted by the upper 32, then run by run.
    template <class Key, class Close>
    void sort(std::size_t first, std::size_t last, const Key& key, const Close& close) {
        if (last - first <= small) {
            insert(first, last, key, close);
            return;
        }
        const std::uint64_t sample = key(order_[first]);
        std::uint64_t differing = 0;
        for (std::size_t place = first; place < last; ++place) {
            differing |= key(order_[place]) ^ sample;
        }
        if (differing == 0) {
            close(first, last);
            return;
        }
        const unsigned top = static_cast<unsigned>(std::bit_width(differing));
        const unsigned bottom = static_cast<unsigned>(std::countr_zero(differing));
        const unsigned low = std::max(bottom, std::max(top, 32U) - 32U);
        const std::uint64_t mask = (std::uint64_t{1} << (top - low)) - 1;
        for (std::size_t place = first; place < last; ++place) {
            from_[place] = ((key(order_[place]) >> low) & mask) << 32 | order_[place];
        }
        const std::uint64_t* const sorted = radix_sort(from_ + first, to_ + first, last - first, top - low) - first;
        for (std::size_t place = first; place < last; ++place) {
            order_[place] = static_cast<std::uint32_t>(sorted[place]);
        }
        if constexpr (std::same_as<Close, Mark>) {
            if (low == bottom) {
                close.all(sorted, first, last);
                return;
            }
        }
        // Sorting a run again overwrites the records of that run alone.
        for (std::size_t begin = first; begin < last;) {
            const std::uint64_t shared = sorted[begin] >> 32;
            std::size_t end = begin + 1;
            while (end < last && sorted[end] >> 32 == shared) {
                ++end;
            }
            if (low == bottom || end == begin + 1) {
                close(begin, end);
            } else {
                sort(begin, end, key, close);
            }
            begin = end;
        }
    }

  private:
    template <class Key, class Close>
    void insert(std::size_t first, std::size_t last, const Key& key, const Close& close) {
        std::array<std::uint64_t, small> keys;
        const std::size_t size = last - first;
        for (std::size_t place = 0; place < size; ++place) {
            const std::uint32_t row = order_[first + place];
            const std::uint64_t value = key(row);
            std::size_t at = place;
            for (; at > 0 && keys[at - 1] > value; --at) {
                keys[at] = keys[at - 1];
                order_[first + at] = order_[first + at - 1];
            }
            keys[at] = value;
            order_[first + at] = row;
        }
        for (std::size_t begin = 0; begin < size;) {
            std::size_t end = begin + 1;
            while (end < size && keys[end] == keys[begin]) {
                ++end;
            }
            close(first + begin, first + end);
            begin = end;
        }
    }

    std::uint32_t* order_;
    // Records of 32 bits of key and 32 of row, twice [N]. One block: malloc keeps it, two would be faulted in each
    // call.
    std::unique_ptr<std::uint64_t[]> records_;
    std::uint64_t* from_;
    std::uint64_t* to_;
};

}  // namespace

template <std::floating_point C, class L>
    requires std::same_as<L, std::uint8_t> || std::same_as<L, double>
std::size_t sort_order(std::span<const C> confidence, std::span<const L> error, std::span<std::uint32_t> order,
                       std::span<std::uint32_t> tie_ends) {
    const std::size_t n = confidence.size();
    const C* const scores = confidence.data();
    const L* const losses = error.data();
    std::size_t groups = 0;
    Sorter sorter(order);
    const auto surest_first = [=](std::uint32_t row) { return descending_bits(scores[row]); };
    if constexpr (std::same_as<L, std::uint8_t>) {
        // Correct rows first: with that, stable sorting by confidence is all that is left to do.
        std::array<std::size_t, 2> next{0, static_cast<std::size_t>(std::count(error.begin(), error.end(), L{0}))};
        for (std::size_t row = 0; row < n; ++row) {
            order[next[losses[row] != 0]++] = static_cast<std::uint32_t>(row);
        }
        sorter.sort(0, n, surest_first, Mark{tie_ends.data(), &groups});
    } else {
        for (std::size_t row = 0; row < n; ++row) {
            order[row] = static_cast<std::uint32_t>(row);
        }
        const auto smallest_first = [=](std::uint32_t row) { return std::bit_cast<std::uint64_t>(losses[row] + 0.0); };
        sorter.sort(0, n, surest_first, [&](std::size_t begin, std::size_t end) {
            if (end - begin > 1) {
                sorter.sort(begin, end, smallest_first, [](std::size_t, std::size_t) {});
            }
            tie_ends[groups++] = static_cast<std::uint32_t>(end);
        });
    }
    return groups;
}

#define STAGE1_INSTANTIATE(C, L)                                                                      \
    template std::size_t sort_order(std::span<const C>, std::span<const L>, std::span<std::uint32_t>, \
                                    std::span<std::uint32_t>);
STAGE1_INSTANTIATE(float, std::uint8_t)
STAGE1_INSTANTIATE(float, double)
STAGE1_INSTANTIATE(double, std::uint8_t)
STAGE1_INSTANTIATE(double, double)
#undef STAGE1_INSTANTIATE

}  // namespace stage1
