#include "ceilings.h"

#include "threads.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int kChains = 24;

}  // namespace

std::int64_t read_memory(const void* data, std::size_t bytes) {
    constexpr std::size_t part = 1 << 20, stream = part / 4;
    std::int64_t total = 0;
    parallel(static_cast<int>(bytes / part), [&](int task, int) {
        const char* p = static_cast<const char*>(data) + task * part;
        I sums[4] = {izero(), izero(), izero(), izero()};
        for (std::size_t i = 0; i < stream; i += 64) {
            for (int s = 0; s < 4; ++s) sums[s] = sums[s] + load_bytes(p + s * stream + i);
        }
        std::int32_t lanes[16];
        store(lanes, sums[0] + sums[1] + sums[2] + sums[3]);
        if (task == 0) total = lanes[0];
        else if (lanes[0] == 0x7a5c3e19) total += 1;  // as good as never, but nobody knows
    });
    return total;
}

float peak_bf16(int rounds) {
    float total = 0;
    parallel(thread_count(), [&](int task, int) {
        F sums[kChains];
        for (F& one : sums) one = zero();
        bf16 ones[32];
        for (bf16& one : ones) one = 0x3f80;
        const I w = load_bytes(ones);
        for (int round = 0; round < rounds; ++round) {
            const auto x = static_cast<std::uint32_t>(round);
#pragma GCC unroll 24
            for (F& one : sums) one = dot_bf16(one, w, x);
        }
        F sum_of_all = zero();
        for (const F& one : sums) sum_of_all = sum_of_all + one;
        if (task == 0) total = sum(sum_of_all);
    });
    return total;
}

std::int32_t peak_int8(int rounds) {
    std::int32_t total = 0;
    parallel(thread_count(), [&](int task, int) {
        I sums[kChains];
        for (I& one : sums) one = izero();
        const I w = iset(0x01020304);
        for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
            for (I& one : sums) one = dot_u8s8(one, w, round);
        }
        I sum_of_all = izero();
        for (const I& one : sums) sum_of_all = sum_of_all + one;
        std::int32_t lanes[16];
        store(lanes, sum_of_all);
        if (task == 0) total = lanes[0];
    });
    return total;
}

}  // namespace tokenmill::TOKENMILL_ISA
