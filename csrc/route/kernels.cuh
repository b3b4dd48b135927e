// Device code of the router. Nothing here but CUDA C++'s own words, so that tests can run the very same kernels on a
// CPU behind stand-ins for them (tests/emulator.hpp).
#pragma once

#include "stage1/route_cuda.hpp"
#include "stage1/row.hpp"

namespace stage1::cuda {

constexpr int block_threads = 256;
constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// What tiles tell each other of their deferred rows: a status and a number in one word, so no fence is needed between.
using TileState = unsigned long long;
constexpr unsigned unknown = 0;    // as the word before any write
constexpr unsigned aggregate = 1;  // of this tile alone
constexpr unsigned inclusive = 2;  // of this tile and all before it

struct Scratch {
    int ticket;    // next tile to be taken: tiles start in order, so those before one's own always finish
    int finished;  // tiles that read no state any more
    TileState states[1];
};

__device__ inline void publish(TileState* state, unsigned status, int deferred) {
    *const_cast<volatile TileState*>(state) = static_cast<TileState>(status) << 32 | static_cast<unsigned>(deferred);
}

// How many rows are deferred before this tile (decoupled look-back: Merrill and Garland 2016). Called by one warp.
__device__ inline int look_back(TileState* states, int tile, int deferred) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    if (tile == 0) {
        if (lane == 0) {
            publish(states, inclusive, deferred);
        }
        return 0;
    }
    if (lane == 0) {
        publish(states + tile, aggregate, deferred);
    }
    int before = 0;
    for (int nearest = tile - 1;; nearest -= warp_size) {
        const int other = nearest - lane;
        TileState word;
        do {
            word = other < 0 ? static_cast<TileState>(inclusive) << 32
                             : *const_cast<const volatile TileState*>(states + other);
        } while (__any_sync(all_lanes, (word >> 32) == unknown));
        const unsigned complete = __ballot_sync(all_lanes, (word >> 32) == inclusive);
        const int last = complete ? __ffs(static_cast<int>(complete)) - 1 : warp_size - 1;
        int part = lane <= last ? static_cast<int>(static_cast<unsigned>(word)) : 0;
        for (int offset = warp_size / 2; offset > 0; offset /= 2) {
            part += __shfl_xor_sync(all_lanes, part, offset);
        }
        before += part;
        if (complete) {
            break;
        }
    }
    if (lane == 0) {
        publish(states + tile, inclusive, before + deferred);
    }
    return before;
}

// A row's answer by `lanes` threads, each of which gets it: 1, or a whole warp where there are many classes. Sums run
// from class 0 up in either case.
template <int lanes>
__device__ row::Answer answer(const float* logits, int n_classes) {
    if constexpr (lanes == 1) {
        return row::answer(logits, n_classes);
    } else {
        const int lane = static_cast<int>(threadIdx.x) % lanes;
        row::Largest most = row::largest(logits, n_classes, lane, lanes);
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            row::Largest other;
            other.logit = __shfl_xor_sync(all_lanes, most.logit, offset);
            other.label = __shfl_xor_sync(all_lanes, most.label, offset);
            other.defined = __shfl_xor_sync(all_lanes, static_cast<int>(most.defined), offset) != 0;
            most = row::larger(most, other);
        }
        double sum = 0.0;
        for (int first = 0; first < n_classes; first += lanes) {
            const int k = first + lane;
            const double power =
                k < n_classes ? row::exponential(static_cast<double>(logits[k]) - static_cast<double>(most.logit))
                              : 0.0;
            const int size = n_classes - first < lanes ? n_classes - first : lanes;
            for (int source = 0; source < size; ++source) {
                sum += __shfl_sync(all_lanes, power, source);
            }
        }
        return {most.answer(), row::probability(most.answer(), sum)};
    }
}

template <int lanes>
__global__ void __launch_bounds__(block_threads)
    route_kernel(const float* logits, int n, int n_classes, const float* gate, Rule rule, Routed out,
                 Scratch* scratch) {
    constexpr int tile_rows = block_threads / lanes;
    constexpr int warps = block_threads / warp_size;
    __shared__ int shared_tile;
    __shared__ int shared_before;
    __shared__ int shared_last;
    __shared__ int warp_deferred[warps];
    __shared__ bool defers[tile_rows];
    const int thread = static_cast<int>(threadIdx.x);
    const int tiles = static_cast<int>(gridDim.x);
    const bool alone = tiles == 1;
    if (thread == 0) {
        shared_tile = alone ? 0 : atomicAdd(&scratch->ticket, 1);
    }
    __syncthreads();
    const int tile = shared_tile;
    const int first = tile * tile_rows;
    const int place = thread / lanes;
    if (first + place < n) {
        const int r = first + place;
        const row::Answer found = answer<lanes>(logits + static_cast<std::size_t>(r) * n_classes, n_classes);
        float score = found.probability;
        if (rule.score == Score::gate) {
            const double logit = row::gate_logit(gate[r], rule.scale, rule.offset);
            score = row::gate_score(gate[r], found.label, logit, row::exponential(-std::fabs(logit)));
        }
        if (thread % lanes == 0) {
            const bool exits = score >= rule.threshold;
            out.exited[r] = exits;
            out.score[r] = score;
            out.label[r] = found.label;
            out.probability[r] = found.probability;
            defers[place] = !exits;
        }
    }
    __syncthreads();

    // Stable compaction: rank within the warp, within the tile, then behind all earlier tiles.
    const bool mine = thread < tile_rows && first + thread < n && defers[thread];
    const unsigned ballot = __ballot_sync(all_lanes, mine);
    int rank = __popc(ballot & ((1u << thread % warp_size) - 1));
    if (thread % warp_size == 0) {
        warp_deferred[thread / warp_size] = __popc(ballot);
    }
    __syncthreads();
    int deferred = 0;
    for (int warp = 0; warp < warps; ++warp) {
        rank += warp < thread / warp_size ? warp_deferred[warp] : 0;
        deferred += warp_deferred[warp];
    }
    if (thread < warp_size) {
        const int before = alone ? 0 : look_back(scratch->states, tile, deferred);
        if (thread == 0) {
            shared_before = before;
            if (tile == tiles - 1) {
                *out.count = before + deferred;
                if (out.host_count != nullptr) {
                    *out.host_count = before + deferred;
                }
            }
            __threadfence();
            shared_last = !alone && atomicAdd(&scratch->finished, 1) == tiles - 1;
        }
    }
    __syncthreads();
    if (mine) {
        out.deferred[shared_before + rank] = first + thread;
    }
    // The last tile to finish leaves the scratch memory as it was found.
    if (shared_last) {
        for (int state = thread; state < tiles; state += block_threads) {
            scratch->states[state] = 0;
        }
        if (thread == 0) {
            scratch->ticket = 0;
            scratch->finished = 0;
        }
    }
}

template <class Unit>
__global__ void gather_kernel(const Unit* source, std::size_t width, const std::int32_t* index,
                              const std::int32_t* count, Unit* out) {
    const int rows = *count;
    for (int r = static_cast<int>(blockIdx.x); r < rows; r += static_cast<int>(gridDim.x)) {
        const Unit* const from = source + static_cast<std::size_t>(index[r]) * width;
        Unit* const to = out + static_cast<std::size_t>(r) * width;
        const std::size_t stride = static_cast<std::size_t>(gridDim.y) * blockDim.x;
        for (std::size_t unit = static_cast<std::size_t>(blockIdx.y) * blockDim.x + threadIdx.x; unit < width;
             unit += stride) {
            to[unit] = from[unit];
        }
    }
}

template <int lanes>
__global__ void __launch_bounds__(block_threads) merge_kernel(const float* logits, int n_classes, Routed out) {
    const int r = static_cast<int>(blockIdx.x) * (block_threads / lanes) + static_cast<int>(threadIdx.x) / lanes;
    if (r >= *out.count) {
        return;
    }
    const row::Answer found = answer<lanes>(logits + static_cast<std::size_t>(r) * n_classes, n_classes);
    if (threadIdx.x % lanes == 0) {
        const int place = out.deferred[r];
        out.label[place] = found.label;
        out.probability[place] = found.probability;
        out.score[place] = found.probability;
    }
}

}  // namespace stage1::cuda
