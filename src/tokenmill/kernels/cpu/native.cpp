// The Python module. Functions take addresses of memory as integers; who calls them keeps the tensors alive.
#include <nanobind/nanobind.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "kernels.h"
#include "threads.h"

namespace nb = nanobind;

namespace tokenmill {
void bind_attention(nb::module_&);
void bind_ceilings(nb::module_&);
void bind_linear(nb::module_&);
void bind_rows(nb::module_&);
void bind_sample(nb::module_&);
void bind_stack(nb::module_&);

namespace {

// Activations of a large batch take megabytes, which the allocator would give back to the system after each layer and
// fault in again, page by page, for the next.
void keep_freed_memory() {
#if defined(__GLIBC__)
    constexpr int most = 256 << 20;
    mallopt(M_MMAP_THRESHOLD, most);
    mallopt(M_TRIM_THRESHOLD, most);
#endif
}

}  // namespace
}  // namespace tokenmill

NB_MODULE(_native, m) {
    using namespace tokenmill;
    const char* chosen = name(isa());
    m.def("isa", [chosen] { return chosen; }, "The instruction set that the kernels use.");
    m.def("thread_count", &thread_count, "Threads that take part in an operator, the calling one included.");
    m.def("set_thread_count", &set_thread_count, nb::arg("count"), nb::call_guard<nb::gil_scoped_release>());
    m.def("keep_freed_memory", &keep_freed_memory, "Up to 256 MiB of freed memory stay with the process.");
    bind_attention(m);
    bind_ceilings(m);
    bind_linear(m);
    bind_rows(m);
    bind_sample(m);
    bind_stack(m);
}
