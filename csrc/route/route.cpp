#include "stage1/route.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "stage1/machine.hpp"
#include "stage1/row.hpp"

namespace stage1 {
namespace {

constexpr std::size_t block = 256;  // rows at a time: their doubles stay in L1, on the stack

STAGE1_CLONES void exponentials(double* values, std::size_t size) {
    for (std::size_t row = 0; row < size; ++row) {
        values[row] = row::exponential(values[row]);
    }
}

void probabilities(const float* logits, std::size_t n_classes, std::size_t size, std::int32_t* label,
                   float* probability) {
    std::array<double, block> sum;
    std::array<double, block> power;
    std::array<float, block> largest;
    if (n_classes == 1) {
        for (std::size_t row = 0; row < size; ++row) {
            label[row] = row::answer_of_one(logits[row]);
            power[row] = -static_cast<double>(std::fabs(logits[row]));
        }
    } else {
        for (std::size_t row = 0; row < size; ++row) {
            const row::Largest most = row::largest(logits + row * n_classes, static_cast<std::int32_t>(n_classes));
            label[row] = most.answer();
            largest[row] = most.logit;
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
        probability[row] = row::probability(label[row], sum[row]);
    }
}

void gate_scores(const float* gate, const std::int32_t* label, const Rule& rule, std::size_t size, float* score) {
    std::array<double, block> logit;
    std::array<double, block> power;
    for (std::size_t row = 0; row < size; ++row) {
        logit[row] = row::gate_logit(gate[row], rule.scale, rule.offset);
        power[row] = -std::fabs(logit[row]);
    }
    exponentials(power.data(), size);
    for (std::size_t row = 0; row < size; ++row) {
        score[row] = row::gate_score(gate[row], label[row], logit[row], power[row]);
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
