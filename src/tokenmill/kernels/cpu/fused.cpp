#include "fused.h"

#include <cstddef>

#include "rows.h"
#include "threads.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

std::size_t matrix_bytes(int m, int n) { return aligned(sizeof(bf16) * m * n); }

// x or its norm, ready for the weight. `memory` holds the norm's bytes and then those of the rows.
Rows normed_rows(const float* norm, float eps, const Weight& w, const bf16* x, int m, char* memory) {
    auto* normed = reinterpret_cast<bf16*>(memory);
    if (norm != nullptr) {
        rms_norm(x, norm, eps, m, w.k, normed);
        x = normed;
    }
    return prepare_rows(w, x, w.k, m, memory + matrix_bytes(m, w.k));
}

std::size_t normed_bytes(const Weight& w, int m) { return matrix_bytes(m, w.k) + aligned(rows_bytes(w, m)); }

// Queries of one token to `to.q` and its keys to `keys`, normed and rotated.
void rotate_token(const AttentionInput& layer, const AttentionTokens& to, std::int64_t t, const bf16* qkv, bf16* keys) {
    const KVBlocks& cache = to.cache;
    const int width = cache.width, half = layer.half;
    const float *cos = to.cos + t * half, *sin = to.sin + t * half;
    const bf16* k = qkv + layer.q_heads * width;

    const auto head = [&](const bf16* x, const float* weight, float of_all, int index, bf16* out) {
        const bf16* one = x + index * width;
        switch (layer.qk_norm) {
            case QKNorm::none:
                return norm_and_rotate(one, 1.0f, nullptr, cos, sin, half, width, out);
            case QKNorm::head:
                return norm_and_rotate(one, rms_scale(one, width, layer.eps), weight, cos, sin, half, width, out);
            case QKNorm::whole:
                return norm_and_rotate(one, of_all, weight + index * width, cos, sin, half, width, out);
        }
    };
    const bool whole = layer.qk_norm == QKNorm::whole;
    const float of_q = whole ? rms_scale(qkv, layer.q_heads * width, layer.eps) : 1.0f;
    for (int index = 0; index < layer.q_heads; ++index) {
        head(qkv, layer.q_norm, of_q, index, to.q + (t * layer.q_heads + index) * width);
    }
    if (to.slots[t] < 0) return;
    const float of_k = whole ? rms_scale(k, cache.heads * width, layer.eps) : 1.0f;
    for (int index = 0; index < cache.heads; ++index) {
        head(k, layer.k_norm, of_k, index, keys + index * width);
    }
}

}  // namespace

void attention_input(const AttentionInput& layer, const AttentionTokens& to) {
    const Weight& w = *layer.qkv;
    const int m = to.tokens;
    const std::size_t before = normed_bytes(w, m);
    auto* memory = static_cast<char*>(caller_scratch(before + matrix_bytes(m, w.n)));
    auto* qkv = reinterpret_cast<bf16*>(memory + before);
    linear(w, normed_rows(layer.norm, layer.eps, w, to.x, m, memory), m, Epilogue::bf16, qkv, w.n);

    constexpr int at_once = 16;  // tokens of a task
    const int of_keys = to.cache.heads * to.cache.width;
    const bf16* values = qkv + layer.q_heads * to.cache.width + of_keys;
    parallel((m + at_once - 1) / at_once, [&](int task, int thread) {
        auto* keys = static_cast<bf16*>(scratch(thread, matrix_bytes(at_once, of_keys)));
        const std::int64_t begin = std::int64_t{task} * at_once;
        const int count = static_cast<int>(m - begin < at_once ? m - begin : at_once);
        for (int t = 0; t < count; ++t) rotate_token(layer, to, begin + t, qkv + (begin + t) * w.n, keys + t * of_keys);
        write_tokens(to.cache, to.slots + begin, count, keys, of_keys, values + begin * w.n, w.n);
    });
}

void mlp_input(const MlpInput& layer, const bf16* x, int tokens, bf16* out) {
    const Weight& w = *layer.gate_up;
    auto* memory = static_cast<char*>(caller_scratch(normed_bytes(w, tokens)));
    linear(w, normed_rows(layer.norm, layer.eps, w, x, tokens, memory), tokens, layer.activation, out, w.n / 2);
}

}  // namespace tokenmill::TOKENMILL_ISA
