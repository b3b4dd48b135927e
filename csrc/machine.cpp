#include "stage1/machine.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace stage1 {

bool parallel_for(std::size_t count, unsigned threads,
                  const std::function<std::function<void(std::size_t)>()>& make_work,
                  const std::function<bool()>& interrupted) {
    std::atomic<std::size_t> next{0};
    std::atomic<bool> stop{false};
    std::mutex mutex;
    std::condition_variable finished;
    std::exception_ptr failure;  // guarded by mutex
    unsigned running = threads;  // guarded by mutex

    const auto run = [&] {
        try {
            const auto work = make_work();
            for (std::size_t item = next++; item < count && !stop; item = next++) {
                work(item);
            }
        } catch (...) {
            stop = true;
            const std::scoped_lock lock(mutex);
            failure = std::current_exception();
        }
        const std::scoped_lock lock(mutex);
        --running;
        finished.notify_one();
    };

    bool complete = true;
    {
        std::vector<std::jthread> workers;
        workers.reserve(threads);
        try {
            for (unsigned worker = 0; worker < threads; ++worker) {
                workers.emplace_back(run);
            }
        } catch (...) {
            // No more threads to be had: those that started must end before this frame does.
            stop = true;
            throw;
        }
        std::unique_lock lock(mutex);
        while (!finished.wait_for(lock, std::chrono::milliseconds(50), [&] { return running == 0; })) {
            lock.unlock();
            if (complete && interrupted()) {
                complete = false;
                stop = true;
            }
            lock.lock();
        }
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
    return complete;
}

}  // namespace stage1
