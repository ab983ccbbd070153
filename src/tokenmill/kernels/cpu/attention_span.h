// What a tile of query rows and a span of positions are to the kernels of attention: attention_vectors.h holds those that
// work on vectors, attention_tiles.h those for the tile unit.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {

#if defined(__AMX_TILE__)
constexpr int kRows = 32;  // two tile registers of them
#else
constexpr int kRows = 12;  // with two vectors beside them they fill the 32 registers
#endif
constexpr int kRowLanes = (kRows + 15) / 16 * 16;
constexpr int kSpan = 512;  // 12 rows of scores stay in the first-level cache
constexpr int kGroup = 16;  // tokens of one vector of scores
constexpr int kGroups = kSpan / kGroup;
constexpr int kBeyond = 8;  // groups behind those of a span that have an address too
constexpr int kScoreStride = kSpan + 16;  // not a power of two: rows must not compete for the same cache sets
constexpr int kWeightStride = 2 * kScoreStride;
constexpr float kNever = -1e30f;  // start of a maximum; finite, so that its difference to itself is not NaN
constexpr float kHidden = -INFINITY;

// Positions [low, high) that a query row sees, counted from the span's start.
struct Seen {
    int low, high;
    bool nothing() const { return low >= high; }
};

// Softmax statistics and values of a tile's rows, not yet divided by the sum.
struct Partial {
    float* largest;  // [kRows], in memory for kRowLanes
    float* total;    // the same
    float* values;   // [rows, width]

    static std::int64_t floats(int width) { return 2 * kRowLanes + static_cast<std::int64_t>(kRows) * width; }
    static Partial at(float* memory) { return {memory, memory + kRowLanes, memory + 2 * kRowLanes}; }
    void clear(int rows, int width) const {
        std::fill_n(largest, rows, kNever);
        std::fill_n(total, rows, 0.0f);
        std::fill_n(values, static_cast<std::int64_t>(rows) * width, 0.0f);
    }
};

// A span as the rows of a tile see it, in a cache of elements E, bf16 or int8. The rows are in the order of their
// positions.
template <class E>
struct Span {
    int rows, width, size;  // `size` is that of a block
    float scale, softcap;
    Seen seen[kRows];
    int begin, end;  // groups of which some row sees something
    // Where the groups lie; before `begin` and from `end` on stand repetitions of the first and of the last.
    const E* keys[kGroups + kBeyond];
    const E* values[kGroups + kBeyond];
    const E* after[kBeyond];  // keys that will be wanted when this span is done
    // Of int8, the scales of the tokens of a group; left alone for bf16.
    const float* key_scales[kGroups];
    const float* value_scales[kGroups];

    // Positions that some row sees, in whole groups, of which row `row` sees something.
    int first(int row) const { return seen[row].low / kGroup * kGroup; }
    int last(int row) const { return (seen[row].high + kGroup - 1) / kGroup * kGroup; }
};

// Scores s of [begin, end), a multiple of 16, become c * tanh(s * scale / c), with tanh(x) = 1 - 2 / (1 + exp(2x)).
inline void cap(float* begin, float* end, float scale, float c) {
    const F by = set(c), twice = set(2 / c * scale), one = set(1), two = set(2);
    for (float* p = begin; p < end; p += 16) store(p, by * (one - two / (one + exp(load(p) * twice))));
}

}  // namespace tokenmill::TOKENMILL_ISA
