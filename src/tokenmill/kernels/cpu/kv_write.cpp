#include "attention.h"
#include "threads.h"

namespace tokenmill::TOKENMILL_ISA {

void write_key(const KVBlocks& cache, std::int64_t slot, int head, const bf16* k) {
    const std::int64_t place = slot % cache.size;
    bf16* to = cache.keys + cache.offset(slot / cache.size, head) + 2 * place;
    for (int d = 0; d < cache.width; d += 2, to += 2 * cache.size) {
        to[0] = k[d];
        to[1] = k[d + 1];
    }
}

void write_value(const KVBlocks& cache, std::int64_t slot, int head, const bf16* v) {
    const std::int64_t place = slot % cache.size;
    bf16* to =
        cache.values + cache.offset(slot / cache.size, head) + (place / 2) * 2 * cache.width + place % 2;
    for (int d = 0; d < cache.width; ++d) to[2 * d] = v[d];
}

void kv_write(const KVWrite& call) {
    constexpr int at_once = 16;  // tokens of a task
    parallel((call.tokens + at_once - 1) / at_once, [&](int task, int) {
        const int end = call.tokens < (task + 1) * at_once ? call.tokens : (task + 1) * at_once;
        for (int t = task * at_once; t < end; ++t) {
            if (call.slots[t] < 0) continue;
            for (int head = 0; head < call.cache.heads; ++head) {
                const std::int64_t of_head = static_cast<std::int64_t>(head) * call.cache.width;
                write_key(call.cache, call.slots[t], head, call.k + t * call.k_stride + of_head);
                write_value(call.cache, call.slots[t], head, call.v + t * call.v_stride + of_head);
            }
        }
    });
}

}  // namespace tokenmill::TOKENMILL_ISA
