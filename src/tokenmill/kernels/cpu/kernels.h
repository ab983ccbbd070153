// How one kernel comes to run on every machine.
//
// A source of an operator is compiled once per instruction set, each time into a namespace of that name
// (TOKENMILL_ISA). Its header, outside of those namespaces, says
//
//     TOKENMILL_KERNEL(attention, void(const Attention&));
//
// which declares the function in each of them and makes `tokenmill::attention` the one that this machine runs. Code
// inside one of the namespaces that calls `attention` calls its own, directly.
//
// An operator's source keeps to its own types and to what is inlined: an instance of a standard template that both an
// AVX-512 and a portable source emit is one function to the linker, which may keep the wrong one.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace tokenmill {

using bf16 = std::uint16_t;  // the upper half of a float

enum class Isa { portable, avx2, avx512, avx512bf16, amx };

// The best instruction set of this machine, or a lesser one that the environment variable TOKENMILL_ISA names. Chosen
// once.
Isa isa();

const char* name(Isa isa);

template <class Signature>
struct Kernel {
    Signature* variants[5];

    template <class... Arguments>
    auto operator()(Arguments&&... arguments) const {
        return variants[static_cast<int>(isa())](std::forward<Arguments>(arguments)...);
    }
};

#if defined(__x86_64__) || defined(_M_X64)
#define TOKENMILL_KERNEL(name, ...)                                                          \
    namespace portable {                                                                     \
    std::type_identity_t<__VA_ARGS__> name;                                                  \
    }                                                                                        \
    namespace avx2 {                                                                         \
    std::type_identity_t<__VA_ARGS__> name;                                                  \
    }                                                                                        \
    namespace avx512 {                                                                       \
    std::type_identity_t<__VA_ARGS__> name;                                                  \
    }                                                                                        \
    namespace avx512bf16 {                                                                   \
    std::type_identity_t<__VA_ARGS__> name;                                                  \
    }                                                                                        \
    namespace amx {                                                                          \
    std::type_identity_t<__VA_ARGS__> name;                                                  \
    }                                                                                        \
    inline constexpr Kernel<__VA_ARGS__> name {                                              \
        { &portable::name, &avx2::name, &avx512::name, &avx512bf16::name, &amx::name }       \
    }
#else
#define TOKENMILL_KERNEL(name, ...)                                                          \
    namespace portable {                                                                     \
    std::type_identity_t<__VA_ARGS__> name;                                                  \
    }                                                                                        \
    inline constexpr Kernel<__VA_ARGS__> name {                                              \
        { &portable::name }                                                                  \
    }
#endif

}  // namespace tokenmill
