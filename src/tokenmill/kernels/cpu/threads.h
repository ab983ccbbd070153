// One persistent team of threads for every operator of the process.
//
// A step of a model is hundreds of short parallel loops, so a worker that has finished one spins for a moment before it
// sleeps: the next loop usually comes within microseconds. The caller takes part in the work; a loop ends when all of
// its tasks have ended. Which thread runs a task never changes a result.
#pragma once

#include <cstddef>
#include <type_traits>

namespace tokenmill {

using Task = void (*)(void* context, int task, int thread);

// Threads that take part in a loop, the caller included.
int thread_count();

// Sets that number, at least 1. Waits for a loop that is running. Survives fork: a child makes its own team.
void set_thread_count(int count);

// Calls task(context, i, thread) for i in 0 .. tasks - 1 on all threads and returns when all calls have. Loops started
// from several threads at once run one after another. A task must not start a loop itself.
void run_tasks(Task task, void* context, int tasks);

// The same for a callable f(int task, int thread).
template <class F>
void parallel(int tasks, F&& f) {
    using Callable = std::remove_reference_t<F>;
    run_tasks([](void* context, int task, int thread) { (*static_cast<Callable*>(context))(task, thread); },
              const_cast<void*>(static_cast<const void*>(&f)), tasks);
}

// Memory of a thread for use inside a task, kept between loops: at least `bytes`, aligned to 64, with whatever was
// there.
void* scratch(int thread, std::size_t bytes);

// The same for the thread that starts loops, for use around and inside them. A second call may move it.
void* caller_scratch(std::size_t bytes);

}  // namespace tokenmill
