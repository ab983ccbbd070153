#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tokenmill {
namespace {

constexpr auto kSpin = std::chrono::microseconds(100);

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Aligned memory that only grows.
class Buffer {
  public:
    Buffer() = default;
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void* reserve(std::size_t bytes) {
        if (size_ < bytes) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(64, size_);
            if (data_ == nullptr) {
                size_ = 0;
                throw std::bad_alloc();
            }
        }
        return data_;
    }

  private:
    void* data_ = nullptr;
    std::size_t size_ = 0;
};

struct Loop {
    Task task;
    void* context;
    int tasks;
};

// The tasks that one thread is to do, in order. Others that have done theirs help from the other end.
class alignas(64) Share {
  public:
    void set(int begin, int end) { ends_.store(pack(begin, end), std::memory_order_relaxed); }

    // A task, or -1.
    int take(bool first) {
        std::uint64_t ends = ends_.load(std::memory_order_relaxed);
        for (;;) {
            const int begin = static_cast<int>(ends >> 32), end = static_cast<int>(ends & 0xffffffffu);
            if (begin >= end) return -1;
            const std::uint64_t left = first ? pack(begin + 1, end) : pack(begin, end - 1);
            if (ends_.compare_exchange_weak(ends, left, std::memory_order_relaxed)) return first ? begin : end - 1;
        }
    }

  private:
    static std::uint64_t pack(int begin, int end) {
        return static_cast<std::uint64_t>(begin) << 32 | static_cast<std::uint32_t>(end);
    }

    std::atomic<std::uint64_t> ends_{0};
};

// The workers of one process, and the memory of each. A worker joins a loop only while that is open and the caller
// waits only for those that joined, so a worker that the system keeps from running delays nobody.
class Team {
  public:
    explicit Team(int size) : buffers_(size), shares_(size) {
        for (int thread = 1; thread < size; ++thread) {
            threads_.emplace_back([this, thread] { work(thread); });
        }
        pin();
    }

    ~Team() {
        stop_ = true;
        announce();
        for (auto& thread : threads_) thread.join();
    }

    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    void run(const Loop& loop) {
        loop_ = loop;
        for (std::int64_t thread = 0; thread < size(); ++thread) {
            shares_[thread].set(static_cast<int>(loop.tasks * thread / size()),
                                static_cast<int>(loop.tasks * (thread + 1) / size()));
        }
        joined_.store(kOpen, std::memory_order_release);
        announce();
        take(0);
        joined_.fetch_and(~kOpen, std::memory_order_relaxed);
        while (joined_.load(std::memory_order_acquire) != 0) relax();
    }

    int size() const { return static_cast<int>(buffers_.size()); }

    Buffer& buffer(int thread) { return buffers_[thread]; }

  private:
    static constexpr unsigned kOpen = 1u << 31;

    void announce() {
        generation_.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) != 0) generation_.notify_all();
    }

    void take(int thread) {
        for (int offset = 0; offset < size(); ++offset) {
            Share& share = shares_[(thread + offset) % size()];
            for (int task; (task = share.take(offset == 0)) >= 0;) loop_.task(loop_.context, task, thread);
        }
    }

    void join_loop(int thread) {
        unsigned joined = joined_.load(std::memory_order_relaxed);
        while (joined & kOpen) {
            if (joined_.compare_exchange_weak(joined, joined + 1, std::memory_order_acquire)) {
                take(thread);
                joined_.fetch_sub(1, std::memory_order_release);
                return;
            }
        }
    }

    void work(int thread) {
        unsigned seen = 0;
        for (;;) {
            wait(seen);
            seen = generation_.load(std::memory_order_acquire);
            if (stop_) return;
            join_loop(thread);
        }
    }

    void wait(unsigned seen) {
        const auto until = std::chrono::steady_clock::now() + kSpin;
        for (int round = 0;; ++round) {
            if (generation_.load(std::memory_order_acquire) != seen) return;
            relax();
            if (round % 64 == 63 && std::chrono::steady_clock::now() > until) break;
        }
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        generation_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }

    // One worker per core that the process may use, from the last one down; the first is left to the caller.
    void pin() {
#if defined(__linux__)
        cpu_set_t allowed;
        if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
        std::vector<int> cores;
        for (int core = 0; core < CPU_SETSIZE; ++core) {
            if (CPU_ISSET(core, &allowed)) cores.push_back(core);
        }
        if (cores.size() <= threads_.size()) return;
        for (std::size_t index = 0; index < threads_.size(); ++index) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cores[cores.size() - 1 - index], &one);
            pthread_setaffinity_np(threads_[index].native_handle(), sizeof(one), &one);
        }
#endif
    }

    std::vector<std::thread> threads_;
    std::vector<Buffer> buffers_;
    std::vector<Share> shares_;
    Loop loop_{};
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<unsigned> generation_{0};
    alignas(64) std::atomic<unsigned> joined_{0};  // workers inside the loop, and whether more may join
    alignas(64) std::atomic<unsigned> sleepers_{0};
};

struct Process {
    std::mutex mutex;  // held while a loop runs
    std::unique_ptr<Team> team;
    std::atomic<int> wanted{1};
};

// Never destroyed: threads may still be running while the process ends.
Process& process() {
    static Process& one = []() -> Process& {
        // No loop may be halfway when a process forks. The child has none of the workers: its team is forgotten, not
        // destroyed, and the next loop makes a new one.
        pthread_atfork([] { process().mutex.lock(); }, [] { process().mutex.unlock(); },
                       [] {
                           (void)process().team.release();
                           process().mutex.unlock();
                       });
        return *new Process;
    }();
    return one;
}

}  // namespace

int thread_count() { return process().wanted; }

void set_thread_count(int count) {
    std::lock_guard lock(process().mutex);
    process().wanted = std::max(1, count);
}

void run_tasks(Task task, void* context, int tasks) {
    Process& one = process();
    std::lock_guard lock(one.mutex);
    if (one.team == nullptr || one.team->size() != one.wanted) {
        one.team.reset();
        one.team = std::make_unique<Team>(one.wanted);
    }
    if (tasks <= 1 || one.team->size() == 1) {
        for (int index = 0; index < tasks; ++index) task(context, index, 0);
    } else {
        one.team->run({task, context, tasks});
    }
}

void* scratch(int thread, std::size_t bytes) { return process().team->buffer(thread).reserve(bytes); }

void* caller_scratch(std::size_t bytes) {
    thread_local Buffer buffer;
    return buffer.reserve(bytes);
}

}  // namespace tokenmill
