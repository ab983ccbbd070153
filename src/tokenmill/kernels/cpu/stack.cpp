#include "stack.h"

#include <time.h>

#include "rows.h"
#include "threads.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Elements of a token in the widest matrix of a layer that is neither the residual stream nor inside a fused call.
int width_of(const Layer& layer) {
    const int queries = layer.attention->q_heads * layer.cache->width, inner = layer.mlp->gate_up->n / 2;
    const int hidden = layer.mlp->gate_up->k, most = queries > inner ? queries : inner;
    return most > hidden ? most : hidden;
}

// Bytes of one such matrix.
std::size_t matrix_bytes(const Layer* layers, int count, int tokens) {
    int most = 0;
    for (int i = 0; i < count; ++i) most = width_of(layers[i]) > most ? width_of(layers[i]) : most;
    return (sizeof(bf16) * most * tokens + 63) / 64 * 64;
}

// Adds the seconds since it was last asked.
class Clock {
  public:
    Clock() : last_(now()) {}
    void add_to(double& seconds) {
        const double before = last_;
        last_ = now();
        seconds += last_ - before;
    }

  private:
    static double now() {
        timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
    }
    double last_;
};

// x += y W^T, or its norm; `projected` is memory for the product.
void run_way_back(const WayBack& way, const bf16* y, int tokens, bf16* x, bf16* projected) {
    const Weight& w = *way.weight;
    const Rows rows = prepare_rows(w, y, w.k, tokens, caller_scratch(rows_bytes(w, tokens)));
    if (way.norm == nullptr) return linear(w, rows, tokens, Epilogue::add_bf16, x, w.n);
    linear(w, rows, tokens, Epilogue::bf16, projected, w.n);
    rms_norm_add(projected, way.norm, way.eps, tokens, w.n, x);
}

}  // namespace

std::size_t layers_bytes(const Layer* layers, int count, int tokens) { return 2 * matrix_bytes(layers, count, tokens); }

void run_layers(const Layer* layers, int count, const LayersInput& in, LayersTime& time) {
    // Two matrices are enough: each part of a layer reads one of them and writes the other.
    auto* one = static_cast<bf16*>(in.memory);
    auto* other = reinterpret_cast<bf16*>(static_cast<char*>(in.memory) + matrix_bytes(layers, count, in.tokens));
    Clock clock;
    for (int i = 0; i < count; ++i) {
        const Layer& layer = layers[i];
        attention_input(*layer.attention, {in.x, in.tokens, in.cos[layer.rope], in.sin[layer.rope],
                                           in.slots[layer.group], *layer.cache, one});
        clock.add_to(time.attention_input);
        paged_attention({one, other, in.tokens, layer.attention->q_heads, *layer.cache, in.block_table[layer.group],
                         in.table_stride[layer.group], in.query_start, in.context_lens, in.rows, layer.scale,
                         layer.window, layer.softcap});
        clock.add_to(time.attention);
        run_way_back(layer.from_attention, other, in.tokens, in.x, one);
        clock.add_to(time.ways_back);
        mlp_input(*layer.mlp, in.x, in.tokens, one);
        clock.add_to(time.mlp_input);
        run_way_back(layer.from_mlp, one, in.tokens, in.x, other);
        clock.add_to(time.ways_back);
    }
}

}  // namespace tokenmill::TOKENMILL_ISA
