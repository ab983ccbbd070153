#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tokenmill {
namespace {

// Whether this processor has tiles and the system lets this process, with all threads and children to come, use them.
bool tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned bf16_products = 1u << 22, tile_registers = 1u << 24, int8_products = 1u << 25;
    constexpr unsigned all = bf16_products | tile_registers | int8_products;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & all) != all) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

Isa best() {
#if defined(__x86_64__) || defined(_M_X64)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool products = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (avx512 && products) return tiles() ? Isa::amx : Isa::avx512bf16;
    if (avx512) return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::portable;
}

Isa choose() {
    const char* wanted = std::getenv("TOKENMILL_ISA");
    if (wanted == nullptr || *wanted == '\0') return best();
    for (Isa one : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx}) {
        if (std::string(name(one)) != wanted) continue;
        if (one <= best()) return one;
        throw std::runtime_error(std::string("TOKENMILL_ISA=") + wanted + ": this machine has only " + name(best()));
    }
    throw std::runtime_error(std::string("TOKENMILL_ISA=") + wanted +
                             " is not one of portable, avx2, avx512, avx512bf16, amx");
}

}  // namespace

Isa isa() {
    static const Isa chosen = choose();
    return chosen;
}

const char* name(Isa isa) {
    constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
    return names[static_cast<int>(isa)];
}

}  // namespace tokenmill
