#include "stage1/route.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "stage1/machine.hpp"

namespace stage1 {
namespace {

constexpr std::size_t block = 256;  // rows at a time: their doubles stay in L1, on the stack
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// exp(x) for x <= 0 within 1e-14 of itself, and exp(-708), nothing in float32, below that: 2^k exp(r) with |r| <=
// ln(2)/2 and Taylor's polynomial.
STAGE1_INLINE double exponential(double x) {
    constexpr double lowest = -708.0;
    constexpr double log2e = 0x1.71547652b82fep+0;
    constexpr double ln2_high = 0x1.62e42fefa3000p-1;  // k times this is exact
    constexpr double ln2_low = 0x1.3de6af278ece6p-42;
    constexpr double round_to_integer = 0x1.8p+52;  // added, the sum's lowest bits are k
    constexpr std::array<double, 12> inverse_factorial{1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                                       1.0 / 5040,     1.0 / 720,     1.0 / 120,    1.0 / 24,
                                                       1.0 / 6,        1.0 / 2,       1.0,          1.0};
    const double clamped = x < lowest ? lowest : x;
    const double shifted = clamped * log2e + round_to_integer;
    const double k = shifted - round_to_integer;
    const double r = (clamped - k * ln2_high) - k * ln2_low;
    double sum = inverse_factorial[0];
    for (std::size_t power = 1; power < inverse_factorial.size(); ++power) {
        sum = sum * r + inverse_factorial[power];
    }
    const double scale = std::bit_cast<double>((std::bit_cast<std::uint64_t>(shifted) + 1023) << 52);
    return sum * scale;
}

STAGE1_CLONES void exponentials(double* values, std::size_t size) {
    for (std::size_t row = 0; row < size; ++row) {
        values[row] = exponential(values[row]);
    }
}

// The most probable class of a row and its logit; -1 when the row has no answer.
STAGE1_INLINE std::int32_t answer(const float* logits, std::size_t n_classes, float& largest) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    std::size_t label = 0;
    bool defined = logits[0] < infinity;
    largest = logits[0];
    for (std::size_t k = 1; k < n_classes; ++k) {
        defined &= logits[k] < infinity;
        if (logits[k] > largest) {
            largest = logits[k];
            label = k;
        }
    }
    return defined && largest > -infinity ? static_cast<std::int32_t>(label) : -1;
}

// One over the sum of exponentials is the largest probability: that class's own exponential is exactly 1.
void probabilities(const float* logits, std::size_t n_classes, std::size_t size, std::int32_t* label,
                   float* probability) {
    std::array<double, block> sum;
    std::array<double, block> power;
    std::array<float, block> largest;
    if (n_classes == 1) {
        for (std::size_t row = 0; row < size; ++row) {
            const float distance = std::fabs(logits[row]);
            label[row] = distance <= std::numeric_limits<float>::max() ? logits[row] > 0 : -1;
            power[row] = -static_cast<double>(distance);
        }
    } else {
        for (std::size_t row = 0; row < size; ++row) {
            label[row] = answer(logits + row * n_classes, n_classes, largest[row]);
        }
    }
    if (n_classes == 2) {
        for (std::size_t row = 0; row < size; ++row) {
            power[row] = -std::fabs(static_cast<double>(logits[2 * row]) - static_cast<double>(logits[2 * row + 1]));
        }
    }
    if (n_classes <= 2) {
        exponentials(power.data(), size);
        for (std::size_t row = 0; row < size; ++row) {
            sum[row] = 1.0 + power[row];
        }
    } else {
        sum.fill(0.0);
        for (std::size_t k = 0; k < n_classes; ++k) {
            for (std::size_t row = 0; row < size; ++row) {
                power[row] = static_cast<double>(logits[row * n_classes + k]) - static_cast<double>(largest[row]);
            }
            exponentials(power.data(), size);
            for (std::size_t row = 0; row < size; ++row) {
                sum[row] += power[row];
            }
        }
    }
    for (std::size_t row = 0; row < size; ++row) {
        probability[row] = label[row] < 0 ? nan : static_cast<float>(1.0 / sum[row]);
    }
}

void gate_scores(const float* gate, const std::int32_t* label, const Rule& rule, std::size_t size, float* score) {
    std::array<double, block> logit;
    std::array<double, block> power;
    for (std::size_t row = 0; row < size; ++row) {
        logit[row] = rule.scale * static_cast<double>(gate[row]) + rule.offset;
        power[row] = -std::fabs(logit[row]);
    }
    exponentials(power.data(), size);
    for (std::size_t row = 0; row < size; ++row) {
        const double sigmoid = (logit[row] >= 0 ? 1.0 : power[row]) / (1.0 + power[row]);
        const bool defined = label[row] >= 0 && std::fabs(gate[row]) <= std::numeric_limits<float>::max();
        score[row] = defined ? static_cast<float>(sigmoid) : nan;
    }
}

}  // namespace

std::size_t route(std::span<const float> logits, std::size_t n_classes, std::span<const float> gate, const Rule& rule,
                  const Routed& out) {
    const std::size_t n = out.exited.size();
    std::size_t deferred = 0;
    for (std::size_t first = 0; first < n; first += block) {
        const std::size_t size = std::min(block, n - first);
        std::int32_t* const label = out.label.data() + first;
        float* const probability = out.probability.data() + first;
        float* const score = out.score.data() + first;
        probabilities(logits.data() + first * n_classes, n_classes, size, label, probability);
        if (rule.score == Score::gate) {
            gate_scores(gate.data() + first, label, rule, size, score);
        } else {
            std::copy_n(probability, size, score);
        }
        for (std::size_t row = 0; row < size; ++row) {
            const bool exits = score[row] >= rule.threshold;
            out.exited[first + row] = exits;
            // Written for every row, kept for those that defer: there is room, since deferred <= first + row.
            out.deferred[deferred] = static_cast<std::int32_t>(first + row);
            deferred += !exits;
        }
    }
    return deferred;
}

void gather(std::span<const float> source, std::size_t width, std::span<const std::int32_t> index,
            std::span<float> out) {
    for (std::size_t row = 0; row < index.size(); ++row) {
        std::copy_n(source.data() + static_cast<std::size_t>(index[row]) * width, width, out.data() + row * width);
    }
}

void merge(std::span<const std::int32_t> index, std::span<const std::int32_t> label, std::span<const float> probability,
           std::span<const float> score, const Routed& out) {
    for (std::size_t row = 0; row < index.size(); ++row) {
        const auto place = static_cast<std::size_t>(index[row]);
        out.label[place] = label[row];
        out.probability[place] = probability[row];
        out.score[place] = score[row];
    }
}

}  // namespace stage1
