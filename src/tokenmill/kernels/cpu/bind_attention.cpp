#include <nanobind/nanobind.h>

#include "attention.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenmill {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_attention(nb::module_& m) {
    using Release = nb::call_guard<nb::gil_scoped_release>;

    nb::enum_<KVFormat>(m, "KVFormat").value("bf16", KVFormat::bf16).value("int8", KVFormat::int8);

    nb::class_<KVBlocks>(m, "KVBlocks", "Where one layer keeps its keys and values.")
        .def(
            "__init__",
            [](KVBlocks* self, KVFormat format, std::uintptr_t keys, std::uintptr_t values, int heads, int size,
               int width) {
                if (heads < 1 || size < 16 || size % 16 != 0 || width < 16 || width % 16 != 0) {
                    throw nb::value_error("size and width must be multiples of 16");
                }
                new (self) KVBlocks{format, pointer<char>(keys), pointer<char>(values), heads, size, width};
            },
            "format"_a, "keys"_a, "values"_a, "heads"_a, "size"_a, "width"_a);

    m.def(
        "kv_write",
        [](std::uintptr_t k, std::int64_t k_stride, std::uintptr_t v, std::int64_t v_stride, std::uintptr_t slots,
           int tokens, const KVBlocks& cache) {
            kv_write(KVWrite{pointer<bf16>(k), pointer<bf16>(v), k_stride, v_stride, pointer<std::int64_t>(slots),
                             tokens, cache});
        },
        "k"_a, "k_stride"_a, "v"_a, "v_stride"_a, "slots"_a, "tokens"_a, "cache"_a, Release());

    m.def(
        "paged_attention",
        [](std::uintptr_t q, std::uintptr_t out, int tokens, int q_heads, const KVBlocks& cache,
           std::uintptr_t block_table, std::int64_t table_stride, std::uintptr_t query_start,
           std::uintptr_t context_lens, int rows, float scale, int window, float softcap) {
            paged_attention(PagedAttention{pointer<bf16>(q), pointer<bf16>(out), tokens, q_heads, cache,
                                           pointer<std::int32_t>(block_table), table_stride,
                                           pointer<std::int32_t>(query_start), pointer<std::int32_t>(context_lens),
                                           rows, scale, window, softcap});
        },
        "q"_a, "out"_a, "tokens"_a, "q_heads"_a, "cache"_a, "block_table"_a, "table_stride"_a, "query_start"_a,
        "context_lens"_a, "rows"_a, "scale"_a, "window"_a, "softcap"_a, Release());
}

}  // namespace tokenmill
