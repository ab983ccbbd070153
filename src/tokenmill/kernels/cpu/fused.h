// The calls of a layer that do several operations in one: what lies between the residual stream and attention, and between
// the residual stream and the product of the feed-forward half. With a plain linear layer for the two ways back, a pre-norm
// layer is five calls.
#pragma once

#include <cstdint>

#include "attention.h"
#include "kernels.h"
#include "linear.h"

namespace tokenmill {

enum class QKNorm {
    none,
    head,   // each head by itself, weights [width]
    whole,  // all heads of a token together, weights [heads * width]
};

// norm, qkv product with its bias, norm of queries and keys, rotation, keys and values into the cache.
struct AttentionInput {
    const float* norm;  // [hidden], or null: x goes into the product as it is
    float eps;
    const Weight* qkv;  // rows of q, then k, then v
    QKNorm qk_norm;
    const float* q_norm;
    const float* k_norm;
    int q_heads, half;  // half: pairs of dimensions that are rotated
};

// One batch for it.
struct AttentionTokens {
    const bf16* x;  // [tokens, hidden]
    int tokens;
    const float* cos;  // [tokens, half]
    const float* sin;
    const std::int64_t* slots;  // [tokens]
    KVBlocks cache;             // says the number of KV heads and the width of all heads
    bf16* q;                    // [tokens, q_heads, width]: the queries, ready for attention
};

TOKENMILL_KERNEL(attention_input, void(const AttentionInput&, const AttentionTokens&));

// norm, gate and up product, activation(gate) * up.
struct MlpInput {
    const float* norm;  // [hidden], or null
    float eps;
    const Weight* gate_up;  // gated
    Epilogue activation;    // silu_gated or gelu_gated
};

// out[tokens][gate_up->n / 2] from x[tokens][hidden]
TOKENMILL_KERNEL(mlp_input, void(const MlpInput&, const bf16* x, int tokens, bf16* out));

}  // namespace tokenmill
