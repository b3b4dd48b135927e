// Runs the router's CUDA kernels, as they stand, on a CPU. A block is a thread, its CUDA threads are fibers of that
// thread, and a barrier passes when every fiber stands at it; blocks meet in memory as they do on a GPU, at moments
// that the operating system chooses. It shows what is computed, not what a GPU's memory model may reorder.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr unsigned warp = 32;
constexpr std::size_t stack_bytes = 64 << 10;

struct Barrier {
    unsigned waiting = 0;
    unsigned generation = 0;
};

struct Block {
    std::vector<ucontext_t> starts;
    std::vector<jmp_buf> fibers;
    std::vector<bool> started;
    std::vector<char> stacks;
    std::vector<bool> done;
    std::vector<std::uint64_t> slots;
    std::vector<Barrier> warps;
    Barrier all;
    jmp_buf scheduler;
    const std::function<void()>* work = nullptr;
};

thread_local Block* block;
thread_local Dim thread_index, block_index, block_dim, grid_dim;

// Jumps, because swapcontext asks the kernel for the signal mask each time.
inline void to_scheduler() {
    if (_setjmp(block->fibers[thread_index.x]) == 0) {
        _longjmp(block->scheduler, 1);
    }
}

inline void to_fiber(unsigned thread) {
    thread_index.x = thread;
    if (_setjmp(block->scheduler) == 0) {
        if (block->started[thread]) {
            _longjmp(block->fibers[thread], 1);
        }
        block->started[thread] = true;
        setcontext(&block->starts[thread]);
    }
}

inline void wait(Barrier& barrier, unsigned members) {
    const unsigned generation = barrier.generation;
    if (++barrier.waiting == members) {
        barrier.waiting = 0;
        ++barrier.generation;
    }
    while (barrier.generation == generation) {
        to_scheduler();
    }
}

// Every lane's value, at every lane.
template <class T>
std::array<T, warp> exchange(T value) {
    Barrier& barrier = block->warps[thread_index.x / warp];
    const unsigned first = thread_index.x / warp * warp;
    std::uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    block->slots[thread_index.x] = word;
    wait(barrier, warp);
    std::array<T, warp> values;
    for (unsigned lane = 0; lane < warp; ++lane) {
        std::memcpy(&values[lane], &block->slots[first + lane], sizeof(T));
    }
    wait(barrier, warp);
    return values;
}

inline void fiber() {
    (*block->work)();
    block->done[thread_index.x] = true;
    to_scheduler();
}

inline void run_block(unsigned threads, const std::function<void()>& work) {
    Block here;
    here.starts.resize(threads);
    here.fibers = std::vector<jmp_buf>(threads);
    here.started.assign(threads, false);
    here.stacks.resize(threads * stack_bytes);
    here.done.assign(threads, false);
    here.slots.resize(threads);
    here.warps.resize((threads + warp - 1) / warp);
    here.work = &work;
    block = &here;
    for (unsigned thread = 0; thread < threads; ++thread) {
        ucontext_t& context = here.starts[thread];
        getcontext(&context);
        context.uc_stack.ss_sp = here.stacks.data() + thread * stack_bytes;
        context.uc_stack.ss_size = stack_bytes;
        context.uc_link = nullptr;
        makecontext(&context, fiber, 0);
    }
    for (bool running = true; running;) {
        running = false;
        for (unsigned thread = 0; thread < threads; ++thread) {
            if (!here.done[thread]) {
                running = true;
                to_fiber(thread);
            }
        }
        std::this_thread::yield();
    }
}

// Blocks start in any order; as many at once as asked for, as on a GPU of so many processors.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, Dim grid, unsigned threads, unsigned resident, Arguments... arguments) {
    const unsigned blocks = grid.x * grid.y;
    std::atomic<unsigned> next{0};
    std::vector<std::thread> processors;
    for (unsigned processor = 0; processor < std::min(resident, blocks); ++processor) {
        processors.emplace_back([&] {
            const std::function<void()> work = [&] { kernel(arguments...); };
            for (unsigned started = next++; started < blocks; started = next++) {
                const unsigned number = blocks - 1 - started;  // the last first: order must come from tickets
                block_index = {number % grid.x, number / grid.x, 1};
                block_dim = {threads, 1, 1};
                grid_dim = grid;
                run_block(threads, work);
            }
        });
    }
    for (std::thread& processor : processors) {
        processor.join();
    }
}

}  // namespace emulator

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static thread_local
#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_dim
#define gridDim emulator::grid_dim

inline void __syncthreads() { emulator::wait(emulator::block->all, emulator::block_dim.x); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline int atomicAdd(int* value, int more) { return __atomic_fetch_add(value, more, __ATOMIC_SEQ_CST); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __ballot_sync(unsigned, bool mine) {
    unsigned ballot = 0;
    const auto values = emulator::exchange(mine);
    for (unsigned lane = 0; lane < emulator::warp; ++lane) {
        ballot |= static_cast<unsigned>(values[lane]) << lane;
    }
    return ballot;
}
inline bool __any_sync(unsigned lanes, bool mine) { return __ballot_sync(lanes, mine) != 0; }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulator::exchange(value)[static_cast<unsigned>(lane)];
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
    return emulator::exchange(value)[(emulator::thread_index.x % emulator::warp) ^ static_cast<unsigned>(other)];
}

#include "../csrc/route/kernels.cuh"

using namespace stage1;

namespace {

cuda::Routed routed(std::uint8_t* exited, float* score, std::int32_t* label, float* probability, std::int32_t* deferred,
                    std::int32_t* counts) {
    return {exited, score, label, probability, deferred, counts, counts + 1};
}

}  // namespace

extern "C" {

// Each row alone, by the function a GPU's thread calls.
void decide(const float* logits, std::size_t n, int n_classes, const float* gate, double scale, double offset,
            float* score, std::int32_t* label, float* probability) {
    for (std::size_t r = 0; r < n; ++r) {
        const row::Answer found = row::answer(logits + r * static_cast<std::size_t>(n_classes), n_classes);
        label[r] = found.label;
        probability[r] = score[r] = found.probability;
        if (gate != nullptr) {
            const double logit = row::gate_logit(gate[r], scale, offset);
            score[r] = row::gate_score(gate[r], found.label, logit, row::exponential(-std::fabs(logit)));
        }
    }
}

// scratch: int64 [2 + tiles], zero at first.
void route(int lanes, unsigned resident, const float* logits, int n, int n_classes, const float* gate, double scale,
           double offset, float threshold, std::uint8_t* exited, float* score, std::int32_t* label, float* probability,
           std::int32_t* deferred, std::int32_t* counts, std::int64_t* scratch) {
    const Rule rule{gate == nullptr ? Score::probability : Score::gate, scale, offset, threshold};
    const auto out = routed(exited, score, label, probability, deferred, counts);
    const unsigned tile = cuda::block_threads / static_cast<unsigned>(lanes);
    const Dim grid{std::max(1u, (static_cast<unsigned>(n) + tile - 1) / tile)};
    emulator::launch(lanes == 1 ? cuda::route_kernel<1> : cuda::route_kernel<32>, grid, cuda::block_threads, resident,
                     logits, n, n_classes, gate, rule, out, reinterpret_cast<cuda::Scratch*>(scratch));
}

void gather(const std::uint16_t* source, std::size_t width, const std::int32_t* index, const std::int32_t* count,
            unsigned capacity, unsigned chunks, std::uint16_t* out) {
    emulator::launch(cuda::gather_kernel<std::uint16_t>, Dim{capacity, chunks}, cuda::block_threads, 2, source, width,
                     index, count, out);
}

void merge(int lanes, const float* logits, int n_classes, unsigned capacity, std::uint8_t* exited, float* score,
           std::int32_t* label, float* probability, std::int32_t* deferred, std::int32_t* counts) {
    const auto out = routed(exited, score, label, probability, deferred, counts);
    const unsigned tile = cuda::block_threads / static_cast<unsigned>(lanes);
    emulator::launch(lanes == 1 ? cuda::merge_kernel<1> : cuda::merge_kernel<32>,
                     Dim{std::max(1u, (capacity + tile - 1) / tile)}, cuda::block_threads, 2, logits, n_classes, out);
}
}
