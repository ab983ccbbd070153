// Attention of a tile of query rows to a span of positions, on vectors: the kernels for both kinds of cache, and how they
// are used for bf16. attention_whole.h is for int8.
#pragma once

#include <array>
#include <cstring>
#include <type_traits>
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

// Elements of the cache are multiplied with a pair of bf16 and summed up as floats, or with a pair of int16 and summed up
// as whole numbers.
inline F dot(F sum, const bf16* elements, std::uint32_t pair) { return dot_bf16(sum, elements, pair); }
inline I dot(I sum, const std::int8_t* elements, std::uint32_t pair) { return dot_s16(sum, elements, pair); }
template <class S>
S nothing() {
    if constexpr (std::is_same_v<S, F>) {
        return zero();
    } else {
        return izero();
    }
}
inline void keep(float* to, F sum) { store(to, sum); }
inline void keep(float* to, I sum) { store_bytes(to, sum); }
template <class E>
using Sum = std::conditional_t<std::is_same_v<E, bf16>, F, I>;
template <class E>
using Weight = std::conditional_t<std::is_same_v<E, bf16>, bf16, std::int16_t>;

// sums[m][16 n + lane] = q[m] . key of the lane's token in keys[n], as floats or int32; q is packed as [pairs][M]. What
// is read after the keys begins at `next`.
template <class E, int M>
void score(const std::uint32_t* q, int pairs, const E* const* keys, const E* const* next, std::int64_t stride,
           float* to) {
    constexpr int N = vectors_for(M);
    Sum<E> sums[M][N];
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) sums[m][n] = nothing<Sum<E>>();
    }
    const E* from[N];
    for (int n = 0; n < N; ++n) from[n] = keys[n];
    for (int pair = 0; pair < pairs; ++pair, q += M) {
        for (int n = 0; asks_ahead(M) && n < N; ++n) __builtin_prefetch(next[n] + pair * stride);
        for (int m = 0; m < M; ++m) {
            for (int n = 0; n < N; ++n) sums[m][n] = dot(sums[m][n], from[n] + pair * stride, q[m]);
        }
    }
#pragma GCC unroll 16  // else sums stay in memory too
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) keep(to + m * kScoreStride + n * kGroup, sums[m][n]);
    }
}

template <class W>
std::uint32_t pair_at(const W* weights, int position) {
    std::uint32_t pair;
    std::memcpy(&pair, weights + position, sizeof pair);
    return pair;
}

// Where the sums of values begin and how they end: floats go on from what is there, whole numbers from 0.
template <class S>
S begin_sum(const float* out) {
    if constexpr (std::is_same_v<S, F>) {
        return load(out);
    } else {
        return izero();
    }
}
inline void end_sum(F sum, const float*, float* out) { store(out, sum); }
inline void end_sum(I sum, const float* step, float* out) { store(out, to_float(sum) * set(*step)); }

// out[m][0 .. 16 N) += weights[m][p] * values[p] over the positions p of [begin, end), both even; of whole numbers = and
// times steps[m].
template <class E, int M, int N>
void add_values(const Weight<E>* weights, const E* const* values, int column, int width, int begin, int end,
                const float* steps, float* out) {
    Sum<E> sums[M][N];
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) sums[m][n] = begin_sum<Sum<E>>(out + m * width + n * kGroup);
    }
    for (int p = begin; p < end;) {
        const int stop = std::min(end, (p / kGroup + 1) * kGroup);
        const E* from = values[p / kGroup] + p % kGroup * width + 2 * column;
        const E* next = values[p / kGroup + kAhead] + p % kGroup * width + 2 * column;
        for (; p < stop; p += 2, from += 2 * width, next += 2 * width) {
            for (int n = 0; asks_ahead(M) && n < N; ++n) __builtin_prefetch(next + 2 * n * kGroup);
            for (int m = 0; m < M; ++m) {
                const std::uint32_t pair = pair_at(weights + m * kWeightStride, p);
                for (int n = 0; n < N; ++n) sums[m][n] = dot(sums[m][n], from + 2 * n * kGroup, pair);
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) end_sum(sums[m][n], steps + m, out + m * width + n * kGroup);
    }
}

// The same over the whole width, as many vectors at a time as fit.
template <class E, int M>
void add_all_values(const Weight<E>* weights, const E* const* values, int width, int begin, int end,
                    const float* steps, float* out) {
    int column = 0;
    const auto add = [&]<int N>(std::integral_constant<int, N>) {
        if constexpr (N <= vectors_for(M)) {
            for (; column + N * kGroup <= width; column += N * kGroup) {
                add_values<E, M, N>(weights, values, column, width, begin, end, steps, out + column);
            }
        }
    };
    add(std::integral_constant<int, 8>{});
    add(std::integral_constant<int, 4>{});
    add(std::integral_constant<int, 2>{});
    add(std::integral_constant<int, 1>{});
}

template <class E, int... Rows>
constexpr auto scores_for(std::integer_sequence<int, Rows...>) {
    return std::array{&score<E, Rows + 1>...};
}
template <class E, int... Rows>
constexpr auto sums_for(std::integer_sequence<int, Rows...>) {
    return std::array{&add_all_values<E, Rows + 1>...};
}
template <class E>
constexpr auto kScore = scores_for<E>(std::make_integer_sequence<int, kRows>{});
template <class E>
constexpr auto kAddValues = sums_for<E>(std::make_integer_sequence<int, kRows>{});

// Caps the scores of the groups that a row sees something of, hides what it does not see, and returns the largest.
template <class E>
float cap_and_hide(const Span<E>& span, int row, float* scores) {
    const Seen seen = span.seen[row];
    const int begin = span.first(row), end = span.last(row);
    if (span.softcap > 0) cap(scores + begin, scores + end, 1.0f, span.softcap);
    std::fill(scores + begin, scores + seen.low, kHidden);
    std::fill(scores + seen.high, scores + end, kHidden);
    F most = set(kNever);
    for (int p = begin; p < end; p += kGroup) most = max(most, load(scores + p));
    return largest(most);
}

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

    void meet(const Span<bf16>& span, const Partial& to) const {
        const int step = vectors_for(span.rows);
        for (int group = span.begin; group < span.end; group += step) {
            const bf16* const* next = group + step < span.end ? span.keys + group + step : span.values + span.begin;
            kScore<bf16>[span.rows - 1](q_, width_ / 2, span.keys + group, next, 2 * span.size,
                                        scores_ + group * kGroup);
        }
        for (int row = 0; row < span.rows; ++row) weigh(span, row, to.largest[row], to.total[row]);
        add_weighted_values(span, to);
    }

  private:
    void weigh(const Span<bf16>& span, int row, float& largest, float& total) const;
    void add_weighted_values(const Span<bf16>& span, const Partial& to) const;
    void add_row(const Span<bf16>& span, int row, Seen seen, float* out) const;

    int width_;
    float* scores_;     // [kRows, kScoreStride]; weights as bf16 take the place of the scores
    std::uint32_t* q_;  // [width / 2, rows]
    bf16* edge_;        // [width, 2]: a pair of tokens of which only one is seen
};

// Turns one row of scores into weights exp(score - largest), as bf16 in the same memory. Places in the row's first and
// last vector that it does not see get weight 0.
inline void ByVectors::weigh(const Span<bf16>& span, int row, float& largest_score, float& total) const {
    largest_score = kNever;
    total = 0;
    if (span.seen[row].nothing()) return;
    float* scores = scores_ + row * kScoreStride;
    const int begin = span.first(row), end = span.last(row);
    for (int p = begin; p < end; p += kGroup) store(scores + p, load(scores + p) * set(span.scale));
    largest_score = cap_and_hide(span, row, scores);

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

inline void ByVectors::add_weighted_values(const Span<bf16>& span, const Partial& to) const {
    std::fill_n(to.values, span.rows * width_, 0.0f);
    // What all rows see, in whole pairs, is read once for all of them; before and after it each row is on its own.
    const int begin = (span.seen[span.rows - 1].low + 1) / 2 * 2, end = span.seen[0].high / 2 * 2;
    const bool shared = begin < end;
    for (int row = 0; row < span.rows; ++row) {
        const Seen seen = span.seen[row];
        add_row(span, row, shared ? Seen{seen.low, begin} : seen, to.values + row * width_);
    }
    if (!shared) return;
    const auto* weights = reinterpret_cast<const bf16*>(scores_);
    kAddValues<bf16>[span.rows - 1](weights, span.values, width_, begin, end, nullptr, to.values);
    for (int row = 0; row < span.rows; ++row) add_row(span, row, {end, span.seen[row].high}, to.values + row * width_);
}

// One row by itself. A pair of tokens of which it sees one is read from a copy in which the other is 0: the unseen token
// has weight 0, but 0 * NaN is NaN.
inline void ByVectors::add_row(const Span<bf16>& span, int row, Seen seen, float* out) const {
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
        kAddValues<bf16>[0](weights, groups, width_, pair, pair + 2, nullptr, out);
    };
    if (seen.low % 2 == 1) add_half(seen.low++);
    const int whole = seen.high / 2 * 2;
    if (seen.low < whole) kAddValues<bf16>[0](weights, span.values, width_, seen.low, whole, nullptr, out);
    if (seen.high % 2 == 1 && seen.low < seen.high) add_half(seen.high - 1);
}

}  // namespace tokenmill::TOKENMILL_ISA
