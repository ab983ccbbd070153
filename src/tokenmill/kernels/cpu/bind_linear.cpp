#include <nanobind/nanobind.h>

#include "linear.h"
#include "pack.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenmill {
namespace {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void run(const Weight& w, std::uintptr_t x, std::int64_t stride, int m, Epilogue epilogue, std::uintptr_t out,
         std::int64_t out_stride) {
    const Rows rows = prepare_rows(w, at<const bf16>(x), stride, m, caller_scratch(rows_bytes(w, m)));
    linear(w, rows, m, epilogue, at<void>(out), out_stride);
}

}  // namespace

void bind_linear(nb::module_& m) {
    using Release = nb::call_guard<nb::gil_scoped_release>;

    nb::enum_<Format>(m, "Format")
        .value("bf16", Format::bf16)
        .value("int8", Format::int8)
        .value("int4", Format::int4);
    nb::enum_<Epilogue>(m, "Epilogue")
        .value("bf16", Epilogue::bf16)
        .value("f32", Epilogue::f32)
        .value("add_bf16", Epilogue::add_bf16)
        .value("silu_gated", Epilogue::silu_gated)
        .value("gelu_gated", Epilogue::gelu_gated);
    nb::class_<Weight>(m, "Weight", "Where a packed weight lies; see linear.h.")
        .def(
            "__init__",
            [](Weight* self, Format format, int n, int k, bool gated, int panels, int depth, std::uintptr_t data,
               std::uintptr_t scales, std::uintptr_t bias, int group, std::uintptr_t multipliers,
               std::uintptr_t offsets, bool bf16_rows) {
                new (self) Weight{format, n, k, gated, panels, depth, at<void>(data), at<float>(scales),
                                  at<float>(bias), group, at<std::uint8_t>(multipliers),
                                  at<std::uint8_t>(offsets), bf16_rows};
            },
            "format"_a, "n"_a, "k"_a, "gated"_a, "panels"_a, "depth"_a, "data"_a, "scales"_a, "bias"_a, "group"_a,
            "multipliers"_a, "offsets"_a, "bf16_rows"_a)
        .def("linear", &run, "x"_a, "stride"_a, "m"_a, "epilogue"_a, "out"_a, "out_stride"_a, Release())
        .def(
            "pack",
            [](const Weight& to, std::uintptr_t data, bool is_float, std::int64_t stride, std::uintptr_t importance) {
                pack(Matrix{at<const void>(data), is_float, stride}, at<const float>(importance), to);
            },
            "data"_a, "is_float"_a, "stride"_a, "importance"_a, Release())
        .def(
            "unpack", [](const Weight& from, std::uintptr_t out) { unpack(from, at<float>(out)); }, "out"_a, Release())
        .def(
            "gather",
            [](const Weight& from, std::uintptr_t rows, int count, float scale, std::uintptr_t out) {
                gather(from, at<const std::int64_t>(rows), count, scale, at<bf16>(out));
            },
            "rows"_a, "count"_a, "scale"_a, "out"_a, Release());
}

}  // namespace tokenmill
