// Attention of a tile of query rows to a span of positions, on vectors.
#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "attention_span.h"

namespace tokenmill::TOKENMILL_ISA {

// Vectors that a kernel for `rows` rows holds: many for few rows, whose sums would otherwise wait for each other.
constexpr int vectors_for(int rows) { return rows <= 2 ? 8 : rows <= 6 ? 4 : 2; }

// Few rows are bound by memory, whose own prefetching ends with a block: they ask for what comes next themselves.
constexpr bool asks_ahead(int rows) { return rows <= 8; }
constexpr int kAhead = 2;  // groups of values

constexpr int kMostVectors = vectors_for(1);

// ---- the two kernels ----

// scores[m][16 n + lane] = scale * (q[m] . key of the lane's token in keys[n]); q is packed as [pairs][M]. What is read
// after the keys begins at `next`.
template <int M>
void score(const std::uint32_t* q, int pairs, const bf16* const* keys, const bf16* const* next, std::int64_t stride,
           float scale, float* scores) {
    constexpr int N = vectors_for(M);
    F sums[M][N];
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) sums[m][n] = zero();
    }
    const bf16* from[N];
    for (int n = 0; n < N; ++n) from[n] = keys[n];
    for (int pair = 0; pair < pairs; ++pair, q += M) {
        for (int n = 0; asks_ahead(M) && n < N; ++n) __builtin_prefetch(next[n] + pair * stride);
        for (int m = 0; m < M; ++m) {
            for (int n = 0; n < N; ++n) sums[m][n] = dot_bf16(sums[m][n], from[n] + pair * stride, q[m]);
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) store(scores + m * kScoreStride + n * kGroup, sums[m][n] * set(scale));
    }
}

inline std::uint32_t pair_at(const bf16* weights, int position) {
    std::uint32_t pair;
    std::memcpy(&pair, weights + position, sizeof pair);
    return pair;
}

// out[m][0 .. 16 N) += weights[m][p] * values[p] over the positions p of [begin, end), both even.
template <int M, int N>
void add_values(const bf16* weights, const bf16* const* values, int column, int width, int begin, int end, float* out) {
    F sums[M][N];
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) sums[m][n] = load(out + m * width + n * kGroup);
    }
    for (int p = begin; p < end;) {
        const int stop = std::min(end, (p / kGroup + 1) * kGroup);
        const bf16* from = values[p / kGroup] + p % kGroup * width + 2 * column;
        const bf16* next = values[p / kGroup + kAhead] + p % kGroup * width + 2 * column;
        for (; p < stop; p += 2, from += 2 * width, next += 2 * width) {
            for (int n = 0; asks_ahead(M) && n < N; ++n) __builtin_prefetch(next + 2 * n * kGroup);
            for (int m = 0; m < M; ++m) {
                const std::uint32_t pair = pair_at(weights + m * kWeightStride, p);
                for (int n = 0; n < N; ++n) sums[m][n] = dot_bf16(sums[m][n], from + 2 * n * kGroup, pair);
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) store(out + m * width + n * kGroup, sums[m][n]);
    }
}

// The same over the whole width, as many vectors at a time as fit.
template <int M>
void add_all_values(const bf16* weights, const bf16* const* values, int width, int begin, int end, float* out) {
    int column = 0;
    const auto add = [&]<int N>(std::integral_constant<int, N>) {
        if constexpr (N <= vectors_for(M)) {
            for (; column + N * kGroup <= width; column += N * kGroup) {
                add_values<M, N>(weights, values, column, width, begin, end, out + column);
            }
        }
    };
    add(std::integral_constant<int, 8>{});
    add(std::integral_constant<int, 4>{});
    add(std::integral_constant<int, 2>{});
    add(std::integral_constant<int, 1>{});
}

template <template <int> class Kernel, int... Rows>
constexpr auto for_each_row_count(std::integer_sequence<int, Rows...>) {
    return std::array{Kernel<Rows + 1>::function...};
}
template <int M>
struct Score {
    static constexpr auto function = &score<M>;
};
template <int M>
struct AddValues {
    static constexpr auto function = &add_all_values<M>;
};
constexpr auto kScore = for_each_row_count<Score>(std::make_integer_sequence<int, kRows>{});
constexpr auto kAddValues = for_each_row_count<AddValues>(std::make_integer_sequence<int, kRows>{});

// ---- one tile and one span ----

// All scores and their weights first, then the weighted sum of values.
class ByVectors {
  public:
    static std::int64_t bytes(int width) { return 4 * (kRows * kScoreStride + kRows * width / 2 + width); }

    ByVectors(void* memory, int width)
        : width_(width),
          scores_(static_cast<float*>(memory)),
          q_(reinterpret_cast<std::uint32_t*>(scores_ + kRows * kScoreStride)),
          edge_(reinterpret_cast<bf16*>(q_ + kRows * width / 2)) {}

    // What a score of `largest` less is weighed with.
    static F weight(F difference) { return exp(difference); }

    // Row r of the tile is q[r], [width].
    void take(const bf16* const* q, int rows) {
        for (int row = 0; row < rows; ++row) {
            for (int pair = 0; pair < width_ / 2; ++pair) q_[pair * rows + row] = pair_at(q[row], 2 * pair);
        }
    }

    void meet(const Span& span, const Partial& to) const {
        const int step = vectors_for(span.rows);
        for (int group = span.begin; group < span.end; group += step) {
            const bf16* const* next = group + step < span.end ? span.keys + group + step : span.values + span.begin;
            kScore[span.rows - 1](q_, width_ / 2, span.keys + group, next, 2 * span.size, span.scale,
                                  scores_ + group * kGroup);
        }
        for (int row = 0; row < span.rows; ++row) weigh(span, row, to.largest[row], to.total[row]);
        add_weighted_values(span, to);
    }

  private:
    void weigh(const Span& span, int row, float& largest, float& total) const;
    void add_weighted_values(const Span& span, const Partial& to) const;
    void add_row(const Span& span, int row, Seen seen, float* out) const;

    int width_;
    float* scores_;     // [kRows, kScoreStride]; weights as bf16 take the place of the scores
    std::uint32_t* q_;  // [width / 2, rows]
    bf16* edge_;        // [width, 2]: a pair of tokens of which only one is seen
};

// Turns one row of scores into weights exp(score - largest), as bf16 in the same memory. Places in the row's first and
// last vector that it does not see get weight 0.
inline void ByVectors::weigh(const Span& span, int row, float& largest_score, float& total) const {
    largest_score = kNever;
    total = 0;
    const Seen seen = span.seen[row];
    if (seen.nothing()) return;
    float* scores = scores_ + row * kScoreStride;
    const int begin = seen.low / kGroup * kGroup, end = (seen.high + kGroup - 1) / kGroup * kGroup;
    if (span.softcap > 0) cap(scores + begin, scores + end, 1.0f, span.softcap);
    std::fill(scores + begin, scores + seen.low, kHidden);
    std::fill(scores + seen.high, scores + end, kHidden);
    F most = set(kNever);
    for (int p = begin; p < end; p += kGroup) most = max(most, load(scores + p));
    largest_score = largest(most);

    const F at = set(largest_score);
    F sums = zero();
    bf16* weights = reinterpret_cast<bf16*>(scores);  // never ahead of the scores that are still to be read
    for (int p = begin; p < end; p += kGroup) {
        const F weight = exp(load(scores + p) - at);
        sums = sums + weight;
        store(weights + p, weight);
    }
    total = sum(sums);
}

inline void ByVectors::add_weighted_values(const Span& span, const Partial& to) const {
    std::fill_n(to.values, span.rows * width_, 0.0f);
    // What all rows see, in whole pairs, is read once for all of them; before and after it each row is on its own.
    const int begin = (span.seen[span.rows - 1].low + 1) / 2 * 2, end = span.seen[0].high / 2 * 2;
    const bool shared = begin < end;
    for (int row = 0; row < span.rows; ++row) {
        const Seen seen = span.seen[row];
        add_row(span, row, shared ? Seen{seen.low, begin} : seen, to.values + row * width_);
    }
    if (!shared) return;
    kAddValues[span.rows - 1](reinterpret_cast<const bf16*>(scores_), span.values, width_, begin, end, to.values);
    for (int row = 0; row < span.rows; ++row) add_row(span, row, {end, span.seen[row].high}, to.values + row * width_);
}

// One row by itself. A pair of tokens of which it sees one is read from a copy in which the other is 0: the unseen token
// has weight 0, but 0 * NaN is NaN.
inline void ByVectors::add_row(const Span& span, int row, Seen seen, float* out) const {
    if (seen.nothing()) return;
    const bf16* weights = reinterpret_cast<const bf16*>(scores_) + row * kWeightStride;
    const auto add_half = [&](int position) {
        const int pair = position / 2 * 2;
        const bf16* from = span.values[pair / kGroup] + pair % kGroup * width_;
        for (int d = 0; d < width_; ++d) {
            edge_[2 * d] = position == pair ? from[2 * d] : bf16{0};
            edge_[2 * d + 1] = position == pair ? bf16{0} : from[2 * d + 1];
        }
        const bf16* only = edge_ - pair % kGroup * width_;
        const bf16* groups[kGroups + kAhead];
        groups[pair / kGroup] = groups[pair / kGroup + kAhead] = only;
        kAddValues[0](weights, groups, width_, pair, pair + 2, out);
    };
    if (seen.low % 2 == 1) add_half(seen.low++);
    const int whole = seen.high / 2 * 2;
    if (seen.low < whole) kAddValues[0](weights, span.values, width_, seen.low, whole, out);
    if (seen.high % 2 == 1 && seen.low < seen.high) add_half(seen.high - 1);
}

}  // namespace tokenmill::TOKENMILL_ISA
