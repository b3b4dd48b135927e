// What the kernels ask of the machine: instruction-set variants and threads. No Python, no torch, no OpenMP.
#pragma once

#include <cstddef>
#include <functional>

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

// Calls work(item) for every item in [0, count) on `threads` new threads, in no fixed order; each thread calls
// make_work() once for a closure with scratch memory of its own.
//
// The calling thread only waits, and asks interrupted() about 20 times a second; once that is true no further item is
// started and the function returns false. An exception in a worker stops the others and is thrown here.
bool parallel_for(std::size_t count, unsigned threads,
                  const std::function<std::function<void(std::size_t)>()>& make_work,
                  const std::function<bool()>& interrupted);

}  // namespace stage1
