// The layers of a model, one after another on the residual stream: what lies between the embedding and the last norm, in
// one call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "fused.h"
#include "kernels.h"
#include "linear.h"

namespace tokenmill {

// A projection back onto the residual stream.
struct WayBack {
    const Weight* weight;
    const float* norm;  // [hidden]: of what is added; or null
    float eps;
};

// x += way_back(attention(x)); x += way_back(mlp(x))
struct Layer {
    const AttentionInput* attention;
    const KVBlocks* cache;
    float scale, softcap;  // as in PagedAttention, and so is the window
    int window;
    WayBack from_attention;
    const MlpInput* mlp;
    WayBack from_mlp;
    int rope, group;  // whose angles it rotates by and whose blocks it keeps its cache in
};

// A batch of tokens for all layers.
struct LayersInput {
    bf16* x;  // [tokens, hidden], the residual stream, changed in place
    int tokens, rows;
    const float* const* cos;  // by rope, [tokens, half]
    const float* const* sin;
    const std::int64_t* const* slots;        // by group, [tokens]
    const std::int32_t* const* block_table;  // by group, [rows, table_stride[group]]
    const std::int64_t* table_stride;
    const std::int32_t* query_start;   // [rows + 1]
    const std::int32_t* context_lens;  // [rows]
    void* memory;  // to work in, of `layers_bytes`
};

// Where the time of layers goes, in seconds.
struct LayersTime {
    double attention_input = 0, attention = 0, mlp_input = 0, ways_back = 0;
};

TOKENMILL_KERNEL(layers_bytes, std::size_t(const Layer* layers, int count, int tokens));

// Runs `count` layers and adds to `time` what each of their parts took.
TOKENMILL_KERNEL(run_layers, void(const Layer* layers, int count, const LayersInput&, LayersTime& time));

}  // namespace tokenmill
