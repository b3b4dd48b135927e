// 0/1 errors, fast. Counts are bytes, eight rows a word. A word times `ones` holds in each byte the sum of the bytes up
// to it, so one multiplication makes eight prefix sums. Every sum is an integer, so the order of additions changes no
// bit.
#include "packed.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

namespace stage1 {
namespace {

constexpr std::uint64_t ones = 0x0101010101010101U;
constexpr std::uint64_t ones16 = 0x0001000100010001U;
constexpr std::size_t block = 1024;
constexpr std::size_t words = block / 8;
constexpr std::size_t stretch = 8;                       // words that Coverage@Risk looks at together
constexpr std::uint64_t too_many = 0xF0F0F0F0F0F0F0F0U;  // a count above 15 would overflow the bytes

STAGE1_INLINE std::uint64_t load(const std::uint8_t* bytes) {
    std::uint64_t word;
    std::memcpy(&word, bytes, sizeof(word));
    return word;
}

struct Totals {
    std::uint64_t pairs = 0;  // sum over rows of c_i (2 E_before + e_i), as if nothing were tied
    std::uint64_t rows = 0;
    std::uint64_t errors = 0;
    std::uint64_t seen = 0;  // bits of all counts
};

// One block of counts after the totals before it. With `keep` it also writes rows and errors before each word.
template <bool keep>
STAGE1_INLINE void scan_block(const std::uint8_t* counts, const std::uint8_t* wrong, Totals& totals,
                              std::uint32_t* rows_before, std::uint32_t* errors_before) {
    std::array<std::uint64_t, words> word, mask, weight;
    std::array<std::uint16_t, words> in_word, errors_in;
    std::memcpy(word.data(), counts, block);
    std::memcpy(mask.data(), wrong, block);
    std::uint64_t seen = 0;
    for (std::size_t w = 0; w < words; ++w) {
        const std::uint64_t through = (word[w] & mask[w]) * ones;
        errors_in[w] = static_cast<std::uint16_t>(through >> 56);
        in_word[w] = static_cast<std::uint16_t>((word[w] * ones) >> 56);
        weight[w] = through + (through << 8);
        seen |= word[w];
    }
    std::array<std::uint8_t, block> weights;
    std::memcpy(weights.data(), weight.data(), block);
    // Sixteen products of at most 15 * 240 fit 16 bits, which takes half the vectors that 32 bits would.
    constexpr std::size_t strip = block / 16;
    std::array<std::uint16_t, strip> products{};
    for (std::size_t first = 0; first < block; first += strip) {
        for (std::size_t row = 0; row < strip; ++row) {
            products[row] = static_cast<std::uint16_t>(products[row] + counts[first + row] * weights[first + row]);
        }
    }
    std::uint32_t inside = 0;
    for (const std::uint16_t product : products) {
        inside += product;
    }
    // The same among the words of a quarter of a stretch, four 16-bit sums a word.
    std::array<std::uint64_t, words / 4> quad_errors, quad_rows, shifted, shifted_rows;
    std::array<std::uint16_t, words / 4> errors_of, rows_of;
    std::memcpy(quad_errors.data(), errors_in.data(), sizeof(quad_errors));
    std::memcpy(quad_rows.data(), in_word.data(), sizeof(quad_rows));
    for (std::size_t q = 0; q < words / 4; ++q) {
        const std::uint64_t errors_through = quad_errors[q] * ones16;
        const std::uint64_t rows_through = quad_rows[q] * ones16;
        errors_of[q] = static_cast<std::uint16_t>(errors_through >> 48);
        rows_of[q] = static_cast<std::uint16_t>(rows_through >> 48);
        shifted[q] = errors_through << 16;
        shifted_rows[q] = rows_through << 16;
    }
    std::array<std::uint16_t, words> errors_earlier, rows_earlier;
    std::memcpy(errors_earlier.data(), shifted.data(), sizeof(errors_earlier));
    std::uint32_t across = 0;
    for (std::size_t w = 0; w < words; ++w) {
        across += std::uint32_t{in_word[w]} * errors_earlier[w];
    }
    if constexpr (keep) {
        std::memcpy(rows_earlier.data(), shifted_rows.data(), sizeof(rows_earlier));
        std::copy(rows_earlier.begin(), rows_earlier.end(), rows_before);
        std::copy(errors_earlier.begin(), errors_earlier.end(), errors_before);
    }
    std::uint64_t far = 0;
    for (std::size_t q = 0; q < words / 4; ++q) {
        if constexpr (keep) {
            for (std::size_t w = 4 * q; w < 4 * q + 4; ++w) {
                rows_before[w] += static_cast<std::uint32_t>(totals.rows);
                errors_before[w] += static_cast<std::uint32_t>(totals.errors);
            }
        }
        far += rows_of[q] * totals.errors;
        totals.errors += errors_of[q];
        totals.rows += rows_of[q];
    }
    totals.pairs += inside + 2 * (across + far);
    totals.seen |= seen;
}

STAGE1_CLONES Totals scan(const std::uint8_t* counts, const std::uint8_t* wrong, std::size_t blocks) {
    Totals totals;
    for (std::size_t b = 0; b < blocks; ++b) {
        scan_block<false>(counts + b * block, wrong + b * block, totals, nullptr, nullptr);
    }
    return totals;
}

STAGE1_CLONES Totals scan_keeping(const std::uint8_t* counts, const std::uint8_t* wrong, std::size_t blocks,
                                  std::uint32_t* rows_before, std::uint32_t* errors_before) {
    Totals totals;
    for (std::size_t b = 0; b < blocks; ++b) {
        scan_block<true>(counts + b * block, wrong + b * block, totals, rows_before + b * words,
                         errors_before + b * words);
    }
    return totals;
}

// Eight numbers at a time, in the vector extension of GCC and Clang; the compiler splits them where registers are
// narrower, so every instruction set adds in the same order.
using Doubles = double __attribute__((vector_size(64)));
using Ints = std::int32_t __attribute__((vector_size(32)));

STAGE1_INLINE Ints ints(const std::int32_t* from) {
    Ints eight;
    std::memcpy(&eight, from, sizeof(eight));
    return eight;
}

STAGE1_INLINE Doubles doubles(Ints eight) { return __builtin_convertvector(eight, Doubles); }

STAGE1_INLINE double add_up(const Doubles& lanes) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Twice n times the area under the selective risk, as if nothing were tied and with risk 0 before the first row: the
// sum over rows of (c_i + c_{i+1}) E_i / C_i. Two fractions share a division; 30 E_i must be below 2^31.
STAGE1_CLONES double risk_area(const std::uint8_t* counts, const std::uint8_t* wrong, std::size_t blocks,
                               const std::uint32_t* rows_before, const std::uint32_t* errors_before) {
    constexpr std::size_t part = 256;  // all that is made of a part stays in L1
    constexpr std::size_t part_words = part / 8;
    Doubles area{};
    for (std::size_t p = 0; p < blocks * (block / part); ++p) {
        const std::uint8_t* here = counts + p * part;
        std::array<std::uint64_t, part_words> through, errors_through;
        for (std::size_t w = 0; w < part_words; ++w) {
            const std::uint64_t word = load(here + 8 * w);
            through[w] = word * ones;
            errors_through[w] = (word & load(wrong + p * part + 8 * w)) * ones;
        }
        std::array<std::uint8_t, part> bytes;
        std::array<std::int32_t, part> rows, errors, steps;
        // Bytes are widened in loops of their own: the compiler vectorises these, and not one with other widths in it.
        std::memcpy(bytes.data(), through.data(), part);
        std::copy(bytes.begin(), bytes.end(), rows.begin());
        std::memcpy(bytes.data(), errors_through.data(), part);
        std::copy(bytes.begin(), bytes.end(), errors.begin());
        for (std::size_t row = 0; row < part; ++row) {
            bytes[row] = static_cast<std::uint8_t>(here[row] + here[row + 1]);
        }
        std::copy(bytes.begin(), bytes.end(), steps.begin());
        const auto fraction = [&](std::size_t w, Doubles& top, Doubles& bottom) __attribute__((always_inline)) {
            const std::size_t word = p * part_words + w;
            const Ints accepted = ints(&rows[8 * w]) + static_cast<std::int32_t>(rows_before[word]);
            const Ints wrongs = ints(&errors[8 * w]) + static_cast<std::int32_t>(errors_before[word]);
            bottom = doubles(accepted - (accepted == 0));  // a comparison that holds is -1
            top = doubles(wrongs * ints(&steps[8 * w]));
        };
        for (std::size_t w = 0; w < part_words / 2; ++w) {
            Doubles top, bottom, other_top, other_bottom;
            fraction(w, top, bottom);
            fraction(w + part_words / 2, other_top, other_bottom);
            area += (top * other_bottom + other_top * bottom) / (bottom * other_bottom);
        }
    }
    return add_up(area);
}

using Sums = std::array<double, batch>;

// For each resample of a batch the sums of counts times two values, all padded with zeros to whole blocks.
STAGE1_CLONES void weighted_sums(const std::array<const std::uint8_t*, batch>& counts, const double* first,
                                 const double* second, std::size_t blocks, Sums& first_sums, Sums& second_sums) {
    std::array<Doubles, batch> of_first{}, of_second{};
    for (std::size_t b = 0; b < blocks; ++b) {
        for (std::size_t r = 0; r < batch; ++r) {
            std::array<std::int32_t, block> times;
            std::copy(counts[r] + b * block, counts[r] + (b + 1) * block, times.begin());
            Doubles sum = of_first[r];
            Doubles other = of_second[r];
            for (std::size_t row = 0; row < block; row += 8) {
                const Doubles weight = doubles(ints(&times[row]));
                Doubles values, others;
                std::memcpy(&values, first + b * block + row, sizeof(values));
                std::memcpy(&others, second + b * block + row, sizeof(others));
                sum += weight * values;
                other += weight * others;
            }
            of_first[r] = sum;
            of_second[r] = other;
        }
    }
    for (std::size_t r = 0; r < batch; ++r) {
        first_sums[r] = add_up(of_first[r]);
        second_sums[r] = add_up(of_second[r]);
    }
}

STAGE1_CLONES std::uint32_t masked_sum(const std::uint8_t* counts, const std::uint8_t* mask, std::size_t n) {
    std::uint32_t total = 0;
    for (std::size_t row = 0; row < n; ++row) {
        total += static_cast<std::uint32_t>(counts[row] & mask[row]);
    }
    return total;
}

STAGE1_CLONES std::uint64_t row_count(const std::uint8_t* counts, std::size_t n) {
    std::uint64_t total = 0;
    for (std::size_t row = 0; row < n; ++row) {
        total += counts[row];
    }
    return total;
}

bool fits(const Totals& totals) { return (totals.seen & too_many) == 0 && totals.rows < most_packed; }

std::uint8_t as_mask(int bit) { return bit != 0 ? 0xFF : 0; }

}  // namespace

// One replicate's counts with the prefix sums of its words.
struct PackedRows::Pass {
    const std::uint8_t* counts;
    const std::uint8_t* wrong;
    const std::uint32_t* rows_before;
    const std::uint32_t* errors_before;

    // Rows and errors among the first `end` rows.
    std::pair<std::uint32_t, std::uint32_t> through(std::size_t end) const {
        const std::size_t w = end / 8;
        if (end % 8 == 0) {
            return {rows_before[w], errors_before[w]};
        }
        const std::uint64_t kept = load(counts + 8 * w) & ((std::uint64_t{1} << (8 * (end % 8))) - 1);
        return {rows_before[w] + static_cast<std::uint32_t>((kept * ones) >> 56),
                errors_before[w] + static_cast<std::uint32_t>(((kept & load(wrong + 8 * w)) * ones) >> 56)};
    }

    // The first row with which at least `target` rows are accepted.
    std::size_t first_reaching(std::uint32_t target, std::size_t n_words) const {
        const auto after = std::lower_bound(rows_before, rows_before + n_words + 1, target);
        const std::size_t w = static_cast<std::size_t>(after - rows_before) - 1;
        std::uint32_t accepted = rows_before[w];
        std::size_t row = 8 * w;
        for (;; ++row) {
            accepted += counts[row];
            if (accepted >= target) {
                return row;
            }
        }
    }
};

PackedRows::PackedRows(const Rows<std::uint8_t>& rows, const Suite& suite)
    : rows_(rows), suite_(suite), blocks_((rows.loss.size() + block - 1) / block), wrong_(blocks_ * block) {
    std::transform(rows.loss.begin(), rows.loss.end(), wrong_.begin(), as_mask);
    std::uint32_t begin = 0;
    for (const std::uint32_t end : rows.tie_ends) {
        if (end - begin > 1) {
            tied_.push_back({begin, end});
            // Errors are last in their group, so the first and the last row tell whether it is mixed.
            if (rows.loss[begin] != rows.loss[end - 1]) {
                mixed_.push_back({begin, end});
            }
        }
        begin = end;
    }
    if (!suite.kind.empty()) {
        for (std::size_t row = 0; row < suite.n_exit; ++row) {
            positive_.push_back(as_mask(suite.kind[row] & is_positive));
            missed_.push_back(as_mask(suite.kind[row] & is_missed));
        }
    }
    const auto pad = [&](std::span<const double> values, Aligned<double>& padded) {
        padded.assign(values.begin(), values.end());
        padded.resize(values.empty() ? 0 : blocks_ * block);
    };
    pad(suite.nll, nll_);
    pad(suite.brier, brier_);
    by_risk_.resize(suite.risks.size());
    std::iota(by_risk_.begin(), by_risk_.end(), std::size_t{0});
    std::stable_sort(by_risk_.begin(), by_risk_.end(),
                     [&](std::size_t a, std::size_t b) { return suite.risks[a] > suite.risks[b]; });
}

std::size_t PackedRows::padded() const { return (blocks_ + 1) * block; }

std::size_t PackedRows::word_count() const { return blocks_ * words; }

void PackedRows::means(const std::array<const std::uint8_t*, batch>& counts, std::span<double> out,
                       std::size_t width) const {
    const auto& first = nll_.empty() ? brier_ : nll_;
    const auto& second = brier_.empty() ? nll_ : brier_;
    Sums first_sums, second_sums;
    weighted_sums(counts, first.data(), second.data(), blocks_, first_sums, second_sums);
    for (std::size_t r = 0; r * width < out.size(); ++r) {
        const std::uint64_t rows = rows_.unit.empty() ? rows_.loss.size() : row_count(counts[r], padded());
        if (!nll_.empty()) {
            out[r * width + nll_at] = first_sums[r] / static_cast<double>(rows);
        }
        if (!brier_.empty()) {
            out[r * width + brier_at] = second_sums[r] / static_cast<double>(rows);
        }
    }
}

std::size_t PackedRows::end_of_tie(std::size_t row) const {
    return tied_.empty()
               ? row + 1
               : *std::upper_bound(rows_.tie_ends.begin(), rows_.tie_ends.end(), static_cast<std::uint32_t>(row));
}

double PackedRows::augrc_of(const std::uint8_t* counts, std::uint64_t pairs, std::uint64_t n) const {
    for (const Group& group : mixed_) {
        // Its right rows stand before its wrong ones here, and share the group's confidence.
        std::uint64_t right = 0;
        std::uint64_t errors = 0;
        for (std::size_t row = group.begin; row < group.end; ++row) {
            const std::uint64_t error = counts[row] & wrong_[row];
            errors += error;
            right += counts[row] - error;
        }
        pairs += right * errors;
    }
    return static_cast<double>(pairs) / static_cast<double>(2 * n * n);
}

// What a tie group adds to the area beyond its rows taken one by one.
double PackedRows::tie_correction(const Pass& pass, const Group& group) {
    // One row that was drawn stands for the group as well as for itself.
    std::size_t drawn = 0;
    for (std::size_t row = group.begin; row < group.end; ++row) {
        drawn += pass.counts[row] != 0 ? 1 : 0;
    }
    if (drawn < 2) {
        return 0;
    }
    auto [accepted, errors] = pass.through(group.begin);
    const double risk_before = accepted != 0 ? static_cast<double>(errors) / static_cast<double>(accepted) : 0.0;
    const std::uint32_t accepted_before = accepted;
    double risk = risk_before;
    double one_by_one = 0;
    for (std::size_t row = group.begin; row < group.end; ++row) {
        const std::uint8_t times = pass.counts[row];
        if (times != 0) {
            accepted += times;
            errors += static_cast<std::uint32_t>(times & pass.wrong[row]);
            const double now = static_cast<double>(errors) / static_cast<double>(accepted);
            one_by_one += times * (risk + now);
            risk = now;
        }
    }
    return static_cast<double>(accepted - accepted_before) * (risk_before + risk) - one_by_one;
}

// Twice n times AURC.
double PackedRows::area(const Pass& pass) const {
    double twice = 0;
    if (4 * rows_.tie_ends.size() < rows_.loss.size()) {
        std::uint32_t accepted = 0;
        double risk = 0;
        for (const std::uint32_t end : rows_.tie_ends) {
            const auto [through, errors] = pass.through(end);
            if (through != accepted) {
                const double now = static_cast<double>(errors) / static_cast<double>(through);
                twice += static_cast<double>(through - accepted) * (risk + now);
                risk = now;
                accepted = through;
            }
        }
    } else {
        twice = risk_area(pass.counts, pass.wrong, blocks_, pass.rows_before, pass.errors_before);
        for (const Group& group : tied_) {
            twice += tie_correction(pass, group);
        }
    }
    // The risk of the highest confidence is repeated down to coverage 0.
    return twice + static_cast<double>(pass.through(end_of_tie(pass.first_reaching(1, word_count()))).second);
}

template <class Within>
double PackedRows::last_within_stretch(const Pass& pass, std::size_t first, std::size_t last, Within within) const {
    if (tied_.empty()) {
        auto [accepted, errors] = pass.through(last);
        for (std::size_t row = last; row-- > first;) {
            if (within(errors, accepted)) {
                return accepted;
            }
            accepted -= pass.counts[row];
            errors -= static_cast<std::uint32_t>(pass.counts[row] & pass.wrong[row]);
        }
        return 0;
    }
    auto end = std::upper_bound(rows_.tie_ends.begin(), rows_.tie_ends.end(), static_cast<std::uint32_t>(last));
    while (end != rows_.tie_ends.begin() && *(end - 1) > first) {
        --end;
        const auto [accepted, errors] = pass.through(*end);
        if (within(errors, accepted)) {
            return accepted;
        }
    }
    return 0;
}

// Rows accepted at the last tie group whose risk is within `target`; 0 without one. The search goes back from
// `stretches`, and leaves there where it stopped: a smaller risk is not met later than a larger one.
double PackedRows::last_within(const Pass& pass, double target, std::size_t& stretches) const {
    const auto within = [&](std::uint32_t errors, std::uint32_t accepted) {
        return static_cast<double>(errors) <= target * static_cast<double>(accepted) * (1 + rounding);
    };
    for (; stretches > 0; --stretches) {
        const std::size_t first = (stretches - 1) * stretch;
        const std::size_t last = std::min(first + stretch, word_count());
        // Fewest errors and most rows that any row of the stretch can have.
        if (!within(pass.errors_before[first], pass.rows_before[last])) {
            continue;
        }
        const double found = last_within_stretch(pass, 8 * first, std::min(8 * last, rows_.loss.size()), within);
        if (found > 0) {
            return found;
        }
    }
    return 0;
}

bool PackedRows::measure(const std::uint8_t* counts, Scratch& scratch, std::span<double> out) const {
    if (out.size() == 1) {
        const Totals totals = scan(counts, wrong_.data(), blocks_);
        if (!fits(totals)) {
            return false;
        }
        out[augrc_at] = augrc_of(counts, totals.pairs, totals.rows);
        return true;
    }
    scratch.rows_before.resize(word_count() + 1);
    scratch.errors_before.resize(word_count() + 1);
    const Totals totals =
        scan_keeping(counts, wrong_.data(), blocks_, scratch.rows_before.data(), scratch.errors_before.data());
    if (!fits(totals)) {
        return false;
    }
    scratch.rows_before.back() = static_cast<std::uint32_t>(totals.rows);
    scratch.errors_before.back() = static_cast<std::uint32_t>(totals.errors);
    const Pass pass{counts, wrong_.data(), scratch.rows_before.data(), scratch.errors_before.data()};
    const double n = static_cast<double>(totals.rows);
    out[augrc_at] = augrc_of(counts, totals.pairs, totals.rows);
    out[aurc_at] = suite_.curve ? area(pass) / (2 * n) : nan;
    out[accuracy_at] = (n - static_cast<double>(totals.errors)) / n;
    out[nll_at] = out[brier_at] = nan;
    out[coverage_at] = out[exit_error_at] = out[fnr_at] = nan;
    if (suite_.exits) {
        const auto [exited, errors] = pass.through(suite_.n_exit);
        out[coverage_at] = static_cast<double>(exited) / n;
        out[exit_error_at] = ratio(static_cast<double>(errors), static_cast<double>(exited));
        if (!suite_.kind.empty()) {
            const double positives = masked_sum(counts, positive_.data(), positive_.size());
            out[fnr_at] = ratio(masked_sum(counts, missed_.data(), missed_.size()), positives);
        }
    }
    for (std::size_t k = 0; k < suite_.coverages.size(); ++k) {
        const auto target = static_cast<std::uint32_t>(std::ceil(suite_.coverages[k] * n * (1 - rounding)));
        const auto [accepted, errors] = pass.through(end_of_tie(pass.first_reaching(target, word_count())));
        out[fixed_columns + k] = static_cast<double>(errors) / static_cast<double>(accepted);
    }
    std::size_t stretches = (word_count() + stretch - 1) / stretch;
    for (const std::size_t k : by_risk_) {
        const double coverage = last_within(pass, suite_.risks[k], stretches);
        out[fixed_columns + suite_.coverages.size() + k] = coverage / n;
    }
    return true;
}

}  // namespace stage1
