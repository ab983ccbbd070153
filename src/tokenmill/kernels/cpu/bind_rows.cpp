#include <nanobind/nanobind.h>

#include "fused.h"
#include "rows.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenmill {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Release = nb::call_guard<nb::gil_scoped_release>;

void bind_matrices(nb::module_& m) {
    nb::enum_<Gate>(m, "Gate").value("silu", Gate::silu).value("gelu", Gate::gelu);
    m.def(
        "rms_norm",
        [](std::uintptr_t x, std::uintptr_t weight, float eps, int rows, int n, std::uintptr_t out) {
            rms_norm(pointer<bf16>(x), pointer<float>(weight), eps, rows, n, pointer<bf16>(out));
        },
        "x"_a, "weight"_a, "eps"_a, "rows"_a, "n"_a, "out"_a, Release());
    m.def(
        "rms_norm_add",
        [](std::uintptr_t x, std::uintptr_t weight, float eps, int rows, int n, std::uintptr_t out) {
            rms_norm_add(pointer<bf16>(x), pointer<float>(weight), eps, rows, n, pointer<bf16>(out));
        },
        "x"_a, "weight"_a, "eps"_a, "rows"_a, "n"_a, "out"_a, Release());
    m.def(
        "gate",
        [](std::uintptr_t x, Gate activation, int rows, int n, std::uintptr_t out) {
            gate(pointer<bf16>(x), activation, rows, n, pointer<bf16>(out));
        },
        "x"_a, "activation"_a, "rows"_a, "n"_a, "out"_a, Release());
    m.def(
        "rope",
        [](std::uintptr_t x, std::uintptr_t cos, std::uintptr_t sin, int half, int tokens, int heads, int width,
           std::uintptr_t out) {
            rope(pointer<bf16>(x), pointer<float>(cos), pointer<float>(sin), half, tokens, heads, width,
                 pointer<bf16>(out));
        },
        "x"_a, "cos"_a, "sin"_a, "half"_a, "tokens"_a, "heads"_a, "width"_a, "out"_a, Release());
}

void bind_fused(nb::module_& m) {
    nb::enum_<QKNorm>(m, "QKNorm")
        .value("none", QKNorm::none)
        .value("head", QKNorm::head)
        .value("whole", QKNorm::whole);
    nb::class_<AttentionInput>(m, "AttentionInput", "From the residual stream to queries and the cache; see fused.h.")
        .def(
            "__init__",
            [](AttentionInput* self, std::uintptr_t norm, float eps, const Weight* qkv, QKNorm qk_norm,
               std::uintptr_t q_norm, std::uintptr_t k_norm, int q_heads, int half) {
                new (self) AttentionInput{pointer<float>(norm),   eps,     qkv, qk_norm, pointer<float>(q_norm),
                                          pointer<float>(k_norm), q_heads, half};
            },
            "norm"_a, "eps"_a, "qkv"_a, "qk_norm"_a, "q_norm"_a, "k_norm"_a, "q_heads"_a, "half"_a,
            nb::keep_alive<1, 4>())
        .def(
            "__call__",
            [](const AttentionInput& self, std::uintptr_t x, int tokens, std::uintptr_t cos, std::uintptr_t sin,
               std::uintptr_t slots, const KVBlocks& cache, std::uintptr_t q) {
                attention_input(self, AttentionTokens{pointer<bf16>(x), tokens, pointer<float>(cos), pointer<float>(sin),
                                                      pointer<std::int64_t>(slots), cache, pointer<bf16>(q)});
            },
            "x"_a, "tokens"_a, "cos"_a, "sin"_a, "slots"_a, "cache"_a, "q"_a, Release());
    nb::class_<MlpInput>(m, "MlpInput", "From the residual stream to activation(gate) * up; see fused.h.")
        .def(
            "__init__",
            [](MlpInput* self, std::uintptr_t norm, float eps, const Weight* gate_up, Epilogue activation) {
                new (self) MlpInput{pointer<float>(norm), eps, gate_up, activation};
            },
            "norm"_a, "eps"_a, "gate_up"_a, "activation"_a, nb::keep_alive<1, 4>())
        .def(
            "__call__",
            [](const MlpInput& self, std::uintptr_t x, int tokens, std::uintptr_t out) {
                mlp_input(self, pointer<bf16>(x), tokens, pointer<bf16>(out));
            },
            "x"_a, "tokens"_a, "out"_a, Release());
}

}  // namespace

void bind_rows(nb::module_& m) {
    bind_matrices(m);
    bind_fused(m);
}

}  // namespace tokenmill
