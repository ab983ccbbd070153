#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <utility>
#include <vector>

#include "stack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenmill {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Addresses = std::vector<std::uintptr_t>;

template <class T>
std::vector<const T*> pointers(const Addresses& addresses) {
    std::vector<const T*> found;
    for (const std::uintptr_t address : addresses) found.push_back(pointer<const T>(address));
    return found;
}

struct Stack {
    explicit Stack(std::vector<Layer> of) : layers(std::move(of)) {}

    std::vector<Layer> layers;
    LayersTime time;

    int count() const { return static_cast<int>(layers.size()); }
};

void run(Stack& stack, std::uintptr_t x, int tokens, int rows, const Addresses& cos, const Addresses& sin,
         const Addresses& slots, const Addresses& tables, const std::vector<std::int64_t>& strides,
         std::uintptr_t query_start, std::uintptr_t context_lens, std::uintptr_t memory) {
    const auto cosines = pointers<float>(cos), sines = pointers<float>(sin);
    const auto all_slots = pointers<std::int64_t>(slots);
    const auto all_tables = pointers<std::int32_t>(tables);
    const LayersInput in{pointer<bf16>(x), tokens, rows, cosines.data(), sines.data(), all_slots.data(),
                         all_tables.data(), strides.data(), pointer<std::int32_t>(query_start),
                         pointer<std::int32_t>(context_lens), pointer<void>(memory)};
    run_layers(stack.layers.data(), stack.count(), in, stack.time);
}

}  // namespace

void bind_stack(nb::module_& m) {
    nb::class_<WayBack>(m, "WayBack", "A projection back onto the residual stream; see stack.h.")
        .def(
            "__init__",
            [](WayBack* self, const Weight* weight, std::uintptr_t norm, float eps) {
                new (self) WayBack{weight, pointer<float>(norm), eps};
            },
            "weight"_a, "norm"_a, "eps"_a);
    nb::class_<Layer>(m, "Layer", "A layer with its cache; see stack.h.")
        .def(
            "__init__",
            [](Layer* self, const AttentionInput* attention, const KVBlocks* cache, float scale, int window,
               float softcap, const WayBack& from_attention, const MlpInput* mlp, const WayBack& from_mlp, int rope,
               int group) {
                new (self) Layer{attention, cache, scale, softcap, window, from_attention, mlp, from_mlp, rope, group};
            },
            "attention"_a, "cache"_a, "scale"_a, "window"_a, "softcap"_a, "from_attention"_a, "mlp"_a, "from_mlp"_a,
            "rope"_a, "group"_a);
    nb::class_<Stack>(m, "Stack", "Layers that run one after another; whoever makes it keeps alive what they point to.")
        .def(nb::init<std::vector<Layer>>(), "layers"_a)
        .def(
            "bytes",
            [](const Stack& self, int tokens) { return layers_bytes(self.layers.data(), self.count(), tokens); },
            "tokens"_a, "Bytes of memory that a call with so many tokens works in.")
        .def("__call__", &run, "x"_a, "tokens"_a, "rows"_a, "cos"_a, "sin"_a, "slots"_a, "tables"_a, "strides"_a,
             "query_start"_a, "context_lens"_a, "memory"_a, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "seconds",
            [](const Stack& self) {
                const LayersTime& time = self.time;
                return nb::make_tuple(time.attention_input, time.attention, time.mlp_input, time.ways_back);
            },
            "Spent so far in: attention input, attention, mlp input, ways back.");
}

}  // namespace tokenmill
