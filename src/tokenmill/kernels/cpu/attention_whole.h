// Attention of a tile of query rows to a span of positions of an int8 cache, on vectors, in whole numbers.
//
// A row of queries becomes int16 of its own step, and so does a row of weights, each weight multiplied by its token's
// scale before. Products with int8 are then exact, in whatever order, and a step is as fine as a part in 32767 of the
// largest: finer than bf16 for all that counts. Widening int8 to int16 is one instruction, to bf16 it would be seven.
#pragma once

#include "attention_vectors.h"
#include "bound.h"

namespace tokenmill::TOKENMILL_ISA {

class ByWholeNumbers {
  public:
    static std::int64_t bytes(int width) { return 4 * (kRows * kScoreStride + kRows * width / 2); }

    ByWholeNumbers(void* memory, int width)
        : width_(width),
          // Sums of `width` products with int8 must fit into 32 bits.
          largest_q_(std::min(32767, static_cast<int>(0x7fffffff / (128LL * width)))),
          scores_(static_cast<float*>(memory)),
          q_(reinterpret_cast<std::uint32_t*>(scores_ + kRows * kScoreStride)) {}

    static F weight(F difference) { return exp(difference); }

    // Row r of the tile is q[r], [width].
    void take(const bf16* const* q, int rows) {
        for (int row = 0; row < rows; ++row) {
            Bound bound;
            for (int d = 0; d < width_; d += 16) bound.add(load(q[row] + d));
            const float step = q_step_[row] = bound.step(largest_q_);
            for (int d = 0; d < width_; d += 16) {
                std::int16_t whole[16] = {};
                if (step > 0) store_int16(whole, to_int(load(q[row] + d) * set(1 / step)));
                for (int i = 0; i < 8; ++i) std::memcpy(q_ + (d / 2 + i) * rows + row, whole + 2 * i, 4);
            }
        }
    }

    void meet(const Span<std::int8_t>& span, const Partial& to) {
        const int step = vectors_for(span.rows);
        for (int group = span.begin; group < span.end; group += step) {
            const auto* next = group + step < span.end ? span.keys + group + step : span.values + span.begin;
            for (int one = group; one < std::min(group + step, span.end); ++one) {
                prefetch(span.key_scales[one]);
                prefetch(span.value_scales[one]);
            }
            kScore<std::int8_t>[span.rows - 1](q_, width_ / 2, span.keys + group, next, 2 * span.size,
                                               scores_ + group * kGroup);
        }
        float steps[kRows];
        for (int row = 0; row < span.rows; ++row) steps[row] = weigh(span, row, to.largest[row], to.total[row]);
        kAddValues<std::int8_t>[span.rows - 1](reinterpret_cast<const std::int16_t*>(scores_), span.values, width_,
                                               span.begin * kGroup, span.end * kGroup, steps, to.values);
    }

  private:
    float weigh(const Span<std::int8_t>& span, int row, float& largest, float& total) const;

    int width_, largest_q_;
    float* scores_;     // [kRows, kScoreStride]; sums as int32, then scores, then weights as int16 in the same memory
    std::uint32_t* q_;  // [width / 2, rows]: pairs of int16
    float q_step_[kRows];
};

// Turns one row of sums into weights exp(score - largest), times the scale of the value, as whole numbers of the step
// that is returned. What the row does not see gets weight 0.
inline float ByWholeNumbers::weigh(const Span<std::int8_t>& span, int row, float& largest_score, float& total) const {
    float* scores = scores_ + row * kScoreStride;
    auto* weights = reinterpret_cast<std::int16_t*>(scores);  // never ahead of the scores that are still to be read
    const Seen seen = span.seen[row];
    const int begin = span.first(row), end = span.last(row);
    largest_score = kNever;
    total = 0;
    if (seen.nothing()) {
        std::fill(weights + span.begin * kGroup, weights + span.end * kGroup, std::int16_t{0});
        return 0;
    }
    const F step = set(q_step_[row] * span.scale);
    for (int p = begin; p < end; p += kGroup) {
        const F sums = to_float(load_bytes(scores + p));
        store(scores + p, sums * (step * load(span.key_scales[p / kGroup])));
    }
    largest_score = cap_and_hide(span, row, scores);

    const F at = set(largest_score), hidden = set(kHidden);
    F sums = zero();
    Bound bound;
    for (int p = begin; p < end; p += kGroup) {
        const F score = load(scores + p), weight = exp(score - at);
        // Nobody knows the scale of a token that is not seen.
        const F scaled = choose_less(hidden, score, weight * load(span.value_scales[p / kGroup]), zero());
        sums = sums + weight;
        bound.add(scaled);
        store(scores + p, scaled);
    }
    total = sum(sums);
    const float unit = bound.step(32767);
    std::fill(weights + span.begin * kGroup, weights + begin, std::int16_t{0});
    for (int p = begin; p < end; p += kGroup) {
        store_int16(weights + p, unit > 0 ? to_int(load(scores + p) * set(1 / unit)) : izero());
    }
    std::fill(weights + end, weights + span.end * kGroup, std::int16_t{0});
    return unit;
}

}  // namespace tokenmill::TOKENMILL_ISA
