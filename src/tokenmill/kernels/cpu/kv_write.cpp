#include "attention.h"

#include <cstring>

#include "threads.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Tokens t to t + count - 1, whose places in a block follow each other, of one head. The places of the block are written
// in the order of memory.
void write_keys(const bf16* k, std::int64_t stride, int count, int size, int width, bf16* to) {
    for (int d = 0; d < width; d += 2, to += 2 * size) {
        for (int t = 0; t < count; ++t) std::memcpy(to + 2 * t, k + t * stride + d, 2 * sizeof(bf16));
    }
}

// `place` is that of the first token in the block, whose values begin at `to`.
void write_values(const bf16* v, std::int64_t stride, int count, int place, int width, bf16* to) {
    for (int t = 0; t < count;) {
        bf16* pair = to + (place + t) / 2 * 2 * width;
        const bf16* first = v + t * stride;
        if ((place + t) % 2 == 0 && t + 1 < count) {
            const bf16* second = first + stride;
            for (int d = 0; d < width; ++d) {
                const std::uint32_t both = first[d] | static_cast<std::uint32_t>(second[d]) << 16;
                std::memcpy(pair + 2 * d, &both, sizeof(both));
            }
            t += 2;
        } else {
            for (int d = 0; d < width; ++d) pair[2 * d + (place + t) % 2] = first[d];
            t += 1;
        }
    }
}

}  // namespace

void write_tokens(const KVBlocks& cache, const std::int64_t* slots, int tokens, const bf16* k, std::int64_t k_stride,
                  const bf16* v, std::int64_t v_stride) {
    for (int t = 0; t < tokens;) {
        const std::int64_t slot = slots[t];
        if (slot < 0) {
            ++t;
            continue;
        }
        const int place = static_cast<int>(slot % cache.size);
        int count = 1;
        while (t + count < tokens && place + count < cache.size && slots[t + count] == slot + count) ++count;
        for (int head = 0; head < cache.heads; ++head) {
            const std::int64_t block = cache.offset(slot / cache.size, head), of_head = std::int64_t{head} * cache.width;
            write_keys(k + t * k_stride + of_head, k_stride, count, cache.size, cache.width,
                       cache.keys + block + 2 * place);
            write_values(v + t * v_stride + of_head, v_stride, count, place, cache.width, cache.values + block);
        }
        t += count;
    }
}

void kv_write(const KVWrite& call) {
    constexpr int at_once = 16;  // tokens of a task
    parallel((call.tokens + at_once - 1) / at_once, [&](int task, int) {
        const std::int64_t begin = std::int64_t{task} * at_once, left = call.tokens - begin;
        write_tokens(call.cache, call.slots + begin, static_cast<int>(left < at_once ? left : at_once),
                     call.k + begin * call.k_stride, call.k_stride, call.v + begin * call.v_stride, call.v_stride);
    });
}

}  // namespace tokenmill::TOKENMILL_ISA
