// Dense layers over packed weights: y = x W^T + bias.
//
// Weights lie in panels of 32 outputs, two vectors of 16, with the inputs of one step side by side in each lane:
//
//   bf16   [panels][K/2][32][2]   pairs of bf16
//   int8   [panels][K/4][32][4]   quads of w + 128, as uint8
//   int4   [panels][K/8][32][4]   two quads of four-bit q in one: see `unpack` in linear.cpp
//
// N is padded to whole panels, K to `depth` (a multiple of 2, 4 or the group), both with zeros. In a gated weight panel
// 2j holds outputs 32j.. of the gate and panel 2j+1 the same outputs of up, so that both meet in one task.
//
// The arithmetic of int8 and int4 is that of integers: int4 is stored as q of four bits and, per group of inputs and
// output, a multiplier m and an offset b, and stands for the int8 weight (q * m >> 4) - b. Activations are rounded to
// int8 with a scale per row. An output is one exact integer sum, scaled once: output n of row r is sum * scales[n] *
// rows.scales[r]. In bf16 an output is one chain of dot products over K. Weights of whole numbers can have that too,
// with rows of bf16: w is a number of bf16, and the sum is scaled by scales[n]. So a row's result is the same whatever
// else is computed with it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace tokenmill {

enum class Format { bf16, int8, int4 };

// Describes memory that somebody else owns: `pack` fills it, `linear` reads it.
struct Weight {
    Format format;
    int n, k;    // outputs (of gate and up together in a gated weight) and inputs
    bool gated;
    int panels;  // even in a gated weight
    int depth;   // inputs with padding
    void* data;
    float* scales;  // int8 and int4: [panels * 32]
    float* bias;    // [panels * 32], or null
    int group;      // int4: inputs per multiplier, a multiple of 32
    std::uint8_t* multipliers;  // int4: [panels][depth / group][32]
    std::uint8_t* offsets;      // int4: the same shape; null means multiplier / 2, which makes q = 8 a zero
    bool bf16_rows;             // int8 and int4: whether rows stay bf16
};

// Activations made ready for a weight's format.
struct Rows {
    const void* data;           // bf16 or int8, `depth` of them per row
    std::int64_t stride;        // bytes from row to row
    const float* scales;        // int8: [count]
    const std::int32_t* sums;   // int8: [count], the sum of a row's integers
    int count;
    bool in_tiles;              // then data is in the order of linear_tiles.h
};

// What becomes of a result y.
enum class Epilogue {
    bf16,        // bf16 out = y
    f32,         // float out = y
    add_bf16,    // bf16 out += y, rounded once
    silu_gated,  // bf16 out = silu(gate) * up, half as many columns
    gelu_gated,  // the same with gelu (tanh)
};

// Bytes of scratch memory that `prepare_rows` wants for m rows.
TOKENMILL_KERNEL(rows_bytes, std::size_t(const Weight&, int m));

// Makes m rows x of bf16, `stride` elements apart, ready for the weight. The result points into scratch or, where
// nothing had to be done, to x. Where rows are int8, one with a NaN or an infinity becomes one whose results are all NaN.
TOKENMILL_KERNEL(prepare_rows, Rows(const Weight&, const bf16* x, std::int64_t stride, int m, void* scratch));

// out[m][n], `out_stride` elements from row to row. Columns past n are not written.
TOKENMILL_KERNEL(linear, void(const Weight&, const Rows&, int m, Epilogue, void* out, std::int64_t out_stride));

}  // namespace tokenmill
