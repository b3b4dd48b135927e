// What the kernels ask of the machine: instruction-set variants and threads. No Python, no torch, no OpenMP.
#pragma once

#include <cstddef>
#include <functional>
#include <new>
#include <vector>

// A function marked so is compiled for each instruction set and chosen at load time, so one wheel runs everywhere.
// What it calls must be inlined (STAGE1_INLINE): a called function is not cloned with its caller.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define STAGE1_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STAGE1_CLONES
#endif

#if defined(__GNUC__)
#define STAGE1_INLINE inline __attribute__((always_inline))
#else
#define STAGE1_INLINE inline
#endif

namespace stage1 {

// Memory that starts at a cache line: vector loads that straddle two cost half the speed of a pass.
template <class T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t line{64};

    LineAllocator() = default;
    template <class U>
    constexpr explicit(false) LineAllocator(const LineAllocator<U>&) noexcept {}

    T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), line)); }
    void deallocate(T* memory, std::size_t) noexcept { ::operator delete(memory, line); }

    template <class U>
    bool operator==(const LineAllocator<U>&) const noexcept {
        return true;
    }
};

template <class T>
using Aligned = std::vector<T, LineAllocator<T>>;

// Calls work(item) for every item in [0, count) on `threads` new threads, in no fixed order; each thread calls
// make_work() once for a closure with scratch memory of its own.
//
// The calling thread only waits, and asks interrupted() about 20 times a second; once that is true no further item is
// started and the function returns false. An exception in a worker stops the others and is thrown here.
bool parallel_for(std::size_t count, unsigned threads,
                  const std::function<std::function<void(std::size_t)>()>& make_work,
                  const std::function<bool()>& interrupted);

}  // namespace stage1
