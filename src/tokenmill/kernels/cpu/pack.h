// Weights into and out of the packed form of linear.h. Outputs are packed in parallel; the result does not depend on
// how.
#pragma once

#include <cstdint>

#include "linear.h"

namespace tokenmill {

// A matrix [n][k] by rows, `stride` elements apart: n and k are those of the weight that it is packed into.
struct Matrix {
    const void* data;
    bool is_float;  // else bf16
    std::int64_t stride;
};

// A matrix of four-bit integers with a scale and a zero per group: w = (q - zero) * scale.
struct Quantized {
    const std::uint8_t* q;  // [n][k], a byte each, 0 to 15
    const float* scales;    // [n][groups]
    const float* zeros;     // [n][groups], or null for 8
};

// Rounds to the weight's format. int8: the largest of an output becomes 127. int4: of some ranges of each group the one
// with the smallest squared error, weighted by `importance` [k] unless that is null. An output with a NaN or an
// infinity gets NaN for its scale.
TOKENMILL_KERNEL(pack, void(const Matrix& from, const float* importance, const Weight& to));

// Keeps every q. Scales keep 8 bits relative to the largest of their output, so small groups are met less closely.
TOKENMILL_KERNEL(pack_quantized, void(const Quantized& from, const Weight& to));

// The matrix [n][k] that the kernels compute with, without the bias.
TOKENMILL_KERNEL(unpack, void(const Weight& from, float* to));

}  // namespace tokenmill
