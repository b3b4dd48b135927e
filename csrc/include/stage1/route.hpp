// The selective router: which rows Stage A answers, and which go on to Stage B. Every result is a function of its row
// alone, so a GPU version can give the same bits.
//
// Bit for bit: probabilities are computed in double with the exponential below, whose every step is one correctly
// rounded operation (no fused multiply-add, no library call), summed from class 0 up, and rounded to float32 once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace stage1 {

// The score that decides: Stage A's probability of its answer, or sigmoid(scale * gate + offset) of a gate logit.
enum class Score : std::uint8_t { probability, gate };

struct Rule {
    Score score;
    double scale;  // of Platt's calibration
    double offset;
    float threshold;  // a row exits iff score >= threshold; NaN never does
};

// Caller-owned, [N] each.
struct Routed {
    std::span<std::uint8_t> exited;
    std::span<float> score;
    std::span<std::int32_t> label;     // most probable class, the first on a tie; -1 where there is no answer
    std::span<float> probability;      // of that class
    std::span<std::int32_t> deferred;  // rows that do not exit, in order; as many as route returns are written
};

// Decides rows without allocating, and returns how many are deferred.
//
// logits: [N, K] row-major, K >= 1. K = 1 is the logit of the second of two classes: softmax of (0, logit).
// gate: [N], or empty for Score::probability.
// A row with NaN or +inf (K = 1: any infinity, which hides whose overflow it was), or with nothing but -inf, has no
// answer: probability and score NaN, label -1, deferred whatever its gate says. A gate that is not finite has score
// NaN.
std::size_t route(std::span<const float> logits, std::size_t n_classes, std::span<const float> gate, const Rule& rule,
                  const Routed& out);

// out[m] = source[index[m]], rows of `width` floats; every index is below the number of rows.
void gather(std::span<const float> source, std::size_t width, std::span<const std::int32_t> index,
            std::span<float> out);

// Writes Stage B's answers [M] back to the rows they came from; every index is below the number of rows.
void merge(std::span<const std::int32_t> index, std::span<const std::int32_t> label, std::span<const float> probability,
           std::span<const float> score, const Routed& out);

}  // namespace stage1
