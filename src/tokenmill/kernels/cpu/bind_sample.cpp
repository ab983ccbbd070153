#include <nanobind/nanobind.h>

#include "sample.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenmill {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_sample(nb::module_& m) {
    using Release = nb::call_guard<nb::gil_scoped_release>;

    m.def(
        "penalize",
        [](std::uintptr_t logits, std::int64_t stride, int rows, int vocabulary, std::uintptr_t history,
           std::uintptr_t starts, std::uintptr_t prompt_lens, std::uintptr_t repetition, std::uintptr_t frequency,
           std::uintptr_t presence) {
            penalize(Penalties{pointer<float>(logits), stride, rows, vocabulary, pointer<std::int64_t>(history),
                               pointer<std::int64_t>(starts), pointer<std::int64_t>(prompt_lens),
                               pointer<float>(repetition), pointer<float>(frequency), pointer<float>(presence)});
        },
        "logits"_a, "stride"_a, "rows"_a, "vocabulary"_a, "history"_a, "starts"_a, "prompt_lens"_a, "repetition"_a,
        "frequency"_a, "presence"_a, Release());

    m.def(
        "sample",
        [](std::uintptr_t logits, std::int64_t stride, int rows, int vocabulary, std::uintptr_t temperature,
           std::uintptr_t top_k, std::uintptr_t top_p, std::uintptr_t min_p, std::uintptr_t uniform,
           std::uintptr_t tokens) {
            sample(Sample{pointer<float>(logits), stride, rows, vocabulary, pointer<float>(temperature),
                          pointer<std::int64_t>(top_k), pointer<float>(top_p), pointer<float>(min_p),
                          pointer<double>(uniform), pointer<std::int64_t>(tokens)});
        },
        "logits"_a, "stride"_a, "rows"_a, "vocabulary"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "uniform"_a,
        "tokens"_a, Release());

    m.def(
        "token_logprobs",
        [](std::uintptr_t logits, std::int64_t stride, int rows, int vocabulary, std::uintptr_t tokens, int k,
           std::uintptr_t logprobs, std::uintptr_t ranks, std::uintptr_t top_ids, std::uintptr_t top_logprobs) {
            token_logprobs(TokenLogprobs{pointer<float>(logits), stride, rows, vocabulary,
                                         pointer<std::int64_t>(tokens), k, pointer<float>(logprobs),
                                         pointer<std::int64_t>(ranks), pointer<std::int64_t>(top_ids),
                                         pointer<float>(top_logprobs)});
        },
        "logits"_a, "stride"_a, "rows"_a, "vocabulary"_a, "tokens"_a, "k"_a, "logprobs"_a, "ranks"_a, "top_ids"_a,
        "top_logprobs"_a, Release());
}

}  // namespace tokenmill
