#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
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

struct Loop {
    Task task;
    void* context;
    int tasks;
};

// The workers of one process. The generation tells them that a loop has begun; the caller waits until all are done with it.
class Team {
  public:
    explicit Team(int workers) {
        for (int thread = 1; thread <= workers; ++thread) {
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
        next_.store(0, std::memory_order_relaxed);
        busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
        announce();
        take(0);
        while (busy_.load(std::memory_order_acquire) != 0) relax();
    }

    int size() const { return static_cast<int>(threads_.size()) + 1; }

    // In the child of a fork the workers do not exist: they must not be joined.
    void abandon() {
        for (auto& thread : threads_) thread.detach();
        threads_.clear();
    }

  private:
    void announce() {
        generation_.fetch_add(1, std::memory_order_release);
        if (sleepers_.load(std::memory_order_seq_cst) != 0) generation_.notify_all();
    }

    void take(int thread) {
        for (int task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < loop_.tasks;) {
            loop_.task(loop_.context, task, thread);
        }
    }

    void work(int thread) {
        unsigned seen = 0;
        for (;;) {
            wait(seen);
            seen = generation_.load(std::memory_order_acquire);
            if (stop_) return;
            take(thread);
            busy_.fetch_sub(1, std::memory_order_release);
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
    Loop loop_{};
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<unsigned> generation_{0};
    alignas(64) std::atomic<int> next_{0};
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<int> sleepers_{0};
};

struct Buffer {
    void* data = nullptr;
    std::size_t size = 0;
};

struct Process {
    std::mutex mutex;
    std::unique_ptr<Team> team;
    std::vector<Buffer> buffers;
    int wanted = 1;
    pid_t pid = 0;
};

// Never destroyed: threads may still be running while the process ends.
Process& process() {
    static Process& one = *new Process;
    return one;
}

Team& team(Process& one) {
    if (one.team != nullptr && one.pid != getpid()) {
        one.team->abandon();
        (void)one.team.release();
    }
    if (one.team == nullptr || one.team->size() != one.wanted) {
        one.team.reset();
        one.team = std::make_unique<Team>(one.wanted - 1);
        one.pid = getpid();
        one.buffers.resize(std::max<std::size_t>(one.buffers.size(), one.wanted));
    }
    return *one.team;
}

}  // namespace

int thread_count() { return process().wanted; }

void set_thread_count(int count) {
    std::lock_guard lock(process().mutex);
    process().wanted = std::max(1, count);
}

void run_tasks(Task task, void* context, int tasks) {
    auto& one = process();
    std::lock_guard lock(one.mutex);
    Team& workers = team(one);
    if (tasks == 1 || workers.size() == 1) {
        for (int index = 0; index < tasks; ++index) task(context, index, 0);
        return;
    }
    workers.run({task, context, tasks});
}

void* scratch(int thread, std::size_t bytes) {
    Buffer& buffer = process().buffers[thread];
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = (bytes + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(64, buffer.size);
        if (buffer.data == nullptr) throw std::bad_alloc();
    }
    return buffer.data;
}

}  // namespace tokenmill
