#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace tokenmill {
namespace {

Isa best() {
#if defined(__x86_64__) || defined(_M_X64)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
    if (avx512) return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::portable;
}

Isa choose() {
    const char* wanted = std::getenv("TOKENMILL_ISA");
    if (wanted == nullptr || *wanted == '\0') return best();
    for (Isa one : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16}) {
        if (std::string(name(one)) != wanted) continue;
        if (one <= best()) return one;
        throw std::runtime_error(std::string("TOKENMILL_ISA=") + wanted + ": this machine has only " + name(best()));
    }
    throw std::runtime_error(std::string("TOKENMILL_ISA=") + wanted +
                             " is not one of portable, avx2, avx512, avx512bf16");
}

}  // namespace

Isa isa() {
    static const Isa chosen = choose();
    return chosen;
}

const char* name(Isa isa) {
    constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512bf16"};
    return names[static_cast<int>(isa)];
}

}  // namespace tokenmill
