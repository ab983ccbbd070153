#include <nanobind/nanobind.h>

#include "ceilings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenmill {

void bind_ceilings(nb::module_& m) {
    using Release = nb::call_guard<nb::gil_scoped_release>;

    m.def(
        "read_memory",
        [](std::uintptr_t data, std::size_t bytes) { return read_memory(reinterpret_cast<const void*>(data), bytes); },
        "data"_a, "bytes"_a, Release());
    m.def("peak_bf16", [](int rounds) { return peak_bf16(rounds); }, "rounds"_a, Release());
    m.def("peak_int8", [](int rounds) { return peak_int8(rounds); }, "rounds"_a, Release());
}

}  // namespace tokenmill
