// What one row decides, step by step, for the CPU and the GPU alike: every step is one correctly rounded operation of
// IEEE 754 (no fused multiply-add, no library call), so both give the same bits. nvcc compiles this with -fmad=false.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "stage1/machine.hpp"

#if defined(__CUDACC__)
#define STAGE1_ROW __host__ __device__ STAGE1_INLINE
#else
#define STAGE1_ROW STAGE1_INLINE
#endif

namespace stage1::row {

// exp(x) for x <= 0 within 1e-14 of itself, and exp(-708), nothing in float32, below that: 2^k exp(r) with |r| <=
// ln(2)/2 and Taylor's polynomial.
STAGE1_ROW double exponential(double x) {
    constexpr double lowest = -708.0;
    constexpr double log2e = 0x1.71547652b82fep+0;
    constexpr double ln2_high = 0x1.62e42fefa3000p-1;  // k times this is exact
    constexpr double ln2_low = 0x1.3de6af278ece6p-42;
    constexpr double round_to_integer = 0x1.8p+52;  // added, the sum's lowest bits are k
    constexpr int powers = 12;
    constexpr double inverse_factorial[powers] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                                  1.0 / 5040,     1.0 / 720,     1.0 / 120,    1.0 / 24,
                                                  1.0 / 6,        1.0 / 2,       1.0,          1.0};
    const double clamped = x < lowest ? lowest : x;
    const double shifted = clamped * log2e + round_to_integer;
    const double k = shifted - round_to_integer;
    const double r = (clamped - k * ln2_high) - k * ln2_low;
    double sum = inverse_factorial[0];
    for (int power = 1; power < powers; ++power) {
        sum = sum * r + inverse_factorial[power];
    }
    const double scale = std::bit_cast<double>((std::bit_cast<std::uint64_t>(shifted) + 1023) << 52);
    return sum * scale;
}

// Of some classes: their largest logit, the first class that has it, and whether none is NaN or +inf.
struct Largest {
    float logit;
    std::int32_t label;
    bool defined;

    // -1 where the row has no answer.
    STAGE1_ROW std::int32_t answer() const {
        return defined && logit > -std::numeric_limits<float>::infinity() ? label : -1;
    }
};

// Over the classes first, first + stride, ... below n_classes; there is at least one.
STAGE1_ROW Largest largest(const float* logits, std::int32_t n_classes, std::int32_t first = 0,
                           std::int32_t stride = 1) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    Largest found{logits[first], first, logits[first] < infinity};
    for (std::int32_t k = first + stride; k < n_classes; k += stride) {
        found.defined &= logits[k] < infinity;
        if (logits[k] > found.logit) {
            found.logit = logits[k];
            found.label = k;
        }
    }
    return found;
}

STAGE1_ROW Largest larger(const Largest& a, const Largest& b) {
    const bool second = b.logit > a.logit || (b.logit == a.logit && b.label < a.label);
    return {second ? b.logit : a.logit, second ? b.label : a.label, a.defined && b.defined};
}

// Of a single logit, the second of two classes.
STAGE1_ROW std::int32_t answer_of_one(float logit) {
    return std::fabs(logit) <= std::numeric_limits<float>::max() ? logit > 0 : -1;
}

// One over the sum of exponentials is the largest probability: that class's own exponential is exactly 1.
STAGE1_ROW float probability(std::int32_t label, double sum) {
    return label < 0 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(1.0 / sum);
}

STAGE1_ROW double gate_logit(float gate, double scale, double offset) {
    return scale * static_cast<double>(gate) + offset;
}

// power: exponential(-|logit|) of the gate's logit.
STAGE1_ROW float gate_score(float gate, std::int32_t label, double logit, double power) {
    const double sigmoid = (logit >= 0 ? 1.0 : power) / (1.0 + power);
    const bool defined = label >= 0 && std::fabs(gate) <= std::numeric_limits<float>::max();
    return defined ? static_cast<float>(sigmoid) : std::numeric_limits<float>::quiet_NaN();
}

struct Answer {
    std::int32_t label;
    float probability;
};

// A whole row by one thread; what the CPU's passes over columns give.
STAGE1_ROW Answer answer(const float* logits, std::int32_t n_classes) {
    if (n_classes == 1) {
        const std::int32_t label = answer_of_one(logits[0]);
        return {label, probability(label, 1.0 + exponential(-static_cast<double>(std::fabs(logits[0]))))};
    }
    const Largest most = largest(logits, n_classes);
    double sum = 0.0;
    for (std::int32_t k = 0; k < n_classes; ++k) {
        sum += exponential(static_cast<double>(logits[k]) - static_cast<double>(most.logit));
    }
    return {most.answer(), probability(most.answer(), sum)};
}

}  // namespace stage1::row
