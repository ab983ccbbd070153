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

// Rounds to the weight's format. int8: the largest of an output becomes 127. int4: the levels of each group, of those
// that a search over ranges finds, with the least squared error, weighted by `importance` [depth] unless that is null.
// An output with a NaN or an infinity gets NaN for its scale.
TOKENMILL_KERNEL(pack, void(const Matrix& from, const float* importance, const Weight& to));

// The matrix [n][k] that the kernels compute with, without the bias.
TOKENMILL_KERNEL(unpack, void(const Weight& from, float* to));

// Rows of a weight that is not gated, [count][k]: rounded to bf16, then multiplied and rounded once more. An embedding
// that is also the head is kept once.
TOKENMILL_KERNEL(gather, void(const Weight& from, const std::int64_t* rows, int count, float scale, bf16* to));

}  // namespace tokenmill
