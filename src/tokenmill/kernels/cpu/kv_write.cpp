#include "attention.h"

#include <cstring>

#include "bound.h"
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

// Makes elements of one token of one head whole numbers, calls to(d, numbers d and d + 1) for even d, and returns their
// scale.
template <class To>
float quantize(const bf16* x, int width, To&& to) {
    Bound bound;
    for (int d = 0; d < width; d += 16) bound.add(load(x + d));
    const float scale = bound.step(127);
    for (int d = 0; d < width; d += 16) {
        std::int8_t whole[16] = {};
        if (scale > 0) store_int8(whole, to_int(load(x + d) / set(scale)));
        for (int i = 0; i < 16; i += 2) to(d + i, whole + i);
    }
    return scale;
}

// The same for int8: elements and scale of each token.
void write_whole_keys(const bf16* k, std::int64_t stride, int count, int place, int size, int width, std::int8_t* to) {
    auto* scales = reinterpret_cast<float*>(to + size * width);
    for (int t = 0; t < count; ++t) {
        std::int8_t* token = to + 2 * (place + t);
        scales[place + t] = quantize(k + t * stride, width, [&](int d, const std::int8_t* pair) {
            std::memcpy(token + d * size, pair, 2);
        });
    }
}

void write_whole_values(const bf16* v, std::int64_t stride, int count, int place, int size, int width,
                        std::int8_t* to) {
    auto* scales = reinterpret_cast<float*>(to + size * width);
    for (int t = 0; t < count; ++t) {
        std::int8_t* token = to + (place + t) / 2 * 2 * width + (place + t) % 2;
        scales[place + t] = quantize(v + t * stride, width, [&](int d, const std::int8_t* pair) {
            token[2 * d] = pair[0];
            token[2 * d + 2] = pair[1];
        });
    }
}

}  // namespace

void write_tokens(const KVBlocks& cache, const std::int64_t* slots, int tokens, const bf16* k, std::int64_t k_stride,
                  const bf16* v, std::int64_t v_stride) {
    const int size = cache.size, width = cache.width;
    for (int t = 0; t < tokens;) {
        const std::int64_t slot = slots[t];
        if (slot < 0) {
            ++t;
            continue;
        }
        const int place = static_cast<int>(slot % size);
        int count = 1;
        while (t + count < tokens && place + count < size && slots[t + count] == slot + count) ++count;
        for (int head = 0; head < cache.heads; ++head) {
            const std::int64_t block = cache.offset(slot / size, head), of_head = std::int64_t{head} * width;
            const bf16 *keys = k + t * k_stride + of_head, *values = v + t * v_stride + of_head;
            char *to_keys = cache.keys + block, *to_values = cache.values + block;
            if (cache.format == KVFormat::int8) {
                write_whole_keys(keys, k_stride, count, place, size, width, reinterpret_cast<std::int8_t*>(to_keys));
                write_whole_values(values, v_stride, count, place, size, width,
                                   reinterpret_cast<std::int8_t*>(to_values));
            } else {
                write_keys(keys, k_stride, count, size, width, reinterpret_cast<bf16*>(to_keys) + 2 * place);
                write_values(values, v_stride, count, place, width, reinterpret_cast<bf16*>(to_values));
            }
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
