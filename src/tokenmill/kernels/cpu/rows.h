// What is done to one row of activations at a time: norms, gates and rotations. Math in float32, bf16 in and out.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace tokenmill {

enum class Gate { silu, gelu };

// ---- whole matrices, in parallel over rows; m rows side by side ----

// out[m][n] = x * weight / sqrt(mean(x^2) + eps), rounded once.
TOKENMILL_KERNEL(rms_norm, void(const bf16* x, const float* weight, float eps, int m, int n, bf16* out));

// out += that, rounded once.
TOKENMILL_KERNEL(rms_norm_add, void(const bf16* x, const float* weight, float eps, int m, int n, bf16* out));

// out[m][n] = activation(x[m][0 .. n)) * x[m][n .. 2n)
TOKENMILL_KERNEL(gate, void(const bf16* x, Gate activation, int m, int n, bf16* out));

// Rotates [tokens, heads, width]: dimension i < half together with i + half, by row t of cos and sin [tokens, half].
TOKENMILL_KERNEL(rope, void(const bf16* x, const float* cos, const float* sin, int half, int tokens, int heads, int width,
                            bf16* out));

// ---- parts of a row ----

// 1 / sqrt(mean(x^2) + eps)
TOKENMILL_KERNEL(rms_scale, float(const bf16* x, int n, float eps));

// One head: out = rotated(x * scale * weight), where without weight x stays as it is, rounded once.
TOKENMILL_KERNEL(norm_and_rotate, void(const bf16* x, float scale, const float* weight, const float* cos, const float* sin,
                                       int half, int width, bf16* out));

}  // namespace tokenmill
