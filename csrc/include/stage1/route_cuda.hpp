// The router on the GPU: three launches (route, gather, merge), no allocation and no synchronisation. Device pointers
// and a stream; no Python, no torch. The bits are those of route.hpp, whose Rule and words these are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "stage1/route.hpp"

struct CUstream_st;
struct CUgraph_st;

namespace stage1::cuda {

using Stream = CUstream_st*;
using Graph = CUgraph_st*;

// On the device, [capacity] each but the counts.
struct Routed {
    std::uint8_t* exited;
    float* score;
    std::int32_t* label;
    float* probability;
    std::int32_t* deferred;  // rows that do not exit, in order; *count of them are written
    std::int32_t* count;
    std::int32_t* host_count;  // the same number in mapped memory of the host, or null
};

// Bytes of scratch memory for so many rows, zero before its first launch. Every launch leaves it zero, so a captured
// graph can be replayed; two launches that may overlap need one each.
std::size_t scratch_bytes(std::size_t capacity);

// The functions throw std::runtime_error with CUDA's own words when a launch is refused. Sizes are below 2^31.

// logits: [n, n_classes] float32; gate: [n], read for Score::gate alone.
void route(const float* logits, std::size_t n, std::size_t n_classes, const float* gate, const Rule& rule,
           const Routed& out, void* scratch, Stream stream);

// Rows of row_bytes bytes each, whatever they hold: out[m] = source[index[m]] for m < *count <= capacity. What lies
// behind is left as it was, so buckets can be padded with what an earlier batch left there.
void gather(const void* source, std::size_t row_bytes, const std::int32_t* index, const std::int32_t* count,
            std::size_t capacity, void* out, Stream stream);

// Stage B's logits [>= *count, n_classes] become answers of the rows they came from: label, probability, and the
// probability as score. `exited` still tells whose they are.
void merge(const float* logits, std::size_t n_classes, std::size_t capacity, const Routed& out, Stream stream);

// One graph whose SWITCH node runs, of several graphs, the one of the smallest bucket that holds *count rows, or none
// when it is 0: Stage B without the host knowing its batch. Needs CUDA 12.8. Untested: no GPU has run it.
class BucketSwitch {
  public:
    // buckets: increasing; graphs: what to run for each, copied; count: on the device.
    BucketSwitch(std::span<const std::int32_t> buckets, std::span<const Graph> graphs, const std::int32_t* count);
    BucketSwitch(const BucketSwitch&) = delete;
    BucketSwitch& operator=(const BucketSwitch&) = delete;
    ~BucketSwitch();

    void launch(Stream stream) const;

  private:
    void* executable_ = nullptr;
};

}  // namespace stage1::cuda
