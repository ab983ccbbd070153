// Keys and values of new tokens into the blocks of a paged cache, and causal attention over them.
//
// A block of one KV head holds `size` tokens of `width` elements, in an order made for dot_bf16 and dot_s16:
//
//   keys     [width / 2][size][2]    pairs of dimensions; the tokens stand in the lanes
//   values   [size / 2][width][2]    pairs of tokens; the dimensions stand in the lanes
//
// so scores are sums over pairs of dimensions and outputs are sums over pairs of tokens, with no shuffle in between.
//
// Elements are bf16, or int8 between -127 and 127. Behind those of a block then stand float32 scales, one per token:
// what is meant is element * scale. A key or value that was not finite has a scale that is NaN.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace tokenmill {

enum class KVFormat { bf16, int8 };

// The cache of one layer, [blocks, heads] blocks of one head. Size and width are multiples of 16.
struct KVBlocks {
    KVFormat format;
    char* keys;
    char* values;
    int heads;
    int size;
    int width;

    // Where one KV head of a block begins, in bytes from keys and from values.
    std::int64_t offset(std::int64_t block, int head) const {
        const int token = format == KVFormat::int8 ? width + static_cast<int>(sizeof(float)) : 2 * width;
        return (block * heads + head) * size * token;
    }
};

// Writes token t of k and v to place slots[t] % size of block slots[t] / size; a negative slot skips it.
struct KVWrite {
    const bf16* k;  // [tokens, heads, width], rows `k_stride` elements apart
    const bf16* v;
    std::int64_t k_stride, v_stride;
    const std::int64_t* slots;  // [tokens]
    int tokens;
    KVBlocks cache;
};

// Row r owns queries query_start[r] .. query_start[r + 1] - 1, the last tokens of a context of context_lens[r] tokens.
// The query at position p sees positions p - window + 1 .. p. What a query does not see never touches its result.
struct PagedAttention {
    const bf16* q;  // [tokens, q_heads, width]
    bf16* out;      // the same shape; zeros for tokens that no row owns
    int tokens, q_heads;
    KVBlocks cache;
    const std::int32_t* block_table;  // [rows, table_stride]
    std::int64_t table_stride;
    const std::int32_t* query_start;   // [rows + 1]
    const std::int32_t* context_lens;  // [rows]
    int rows;
    float scale;
    int window;     // 0: everything
    float softcap;  // 0: none
};

TOKENMILL_KERNEL(kv_write, void(const KVWrite&));
TOKENMILL_KERNEL(paged_attention, void(const PagedAttention&));

// Some tokens into their places, all heads of each, by the thread that calls. Fastest for places that follow each other.
TOKENMILL_KERNEL(write_tokens, void(const KVBlocks&, const std::int64_t* slots, int tokens, const bf16* k,
                                    std::int64_t k_stride, const bf16* v, std::int64_t v_stride));

}  // namespace tokenmill
