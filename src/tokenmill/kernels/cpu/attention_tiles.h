// Attention of a tile of query rows to a span of positions, on the tile unit: at every number of rows, so that a query of
// a prompt and one that is alone go through the same arithmetic.
//
// Groups of keys and of values are tiles as they lie in the cache, or become bf16 tiles just before they are loaded if
// they are int8, whose whole numbers are exact in bf16. A row of a product depends on that row of queries or weights and
// on the group alone, and a position of weight 0 adds exactly nothing, if its value is finite.
#pragma once

#include <cstring>
#include <type_traits>

#include "attention_span.h"
#include "tiles.h"

namespace tokenmill::TOKENMILL_ISA {

// 2^x for x that are not large, with a relative error of 1e-7; below -150 it is 0, and NaN gives NaN. The polynomial is
// the best of degree 5 for 2^x - 1 on [-1/2, 1/2].
inline F exp2(F x) {
    const F clamped = max(set(-160.0f), x);  // the second operand passes NaN on
    const F n = round(clamped), r = clamped - n;
    F p = set(1.3264727e-3f);
    p = fma(p, r, set(9.671513e-3f));
    p = fma(p, r, set(5.5507336e-2f));
    p = fma(p, r, set(0.24022242f));
    p = fma(p, r, set(0.693147f));
    p = fma(p, r, set(1.0f));
    return scale_by_power_of_two(p, n);
}

// Rounds to nearest; subnormal numbers become 0.
inline void store_rounded(bf16* p, F x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x.v);
    std::memcpy(p, &rounded, sizeof rounded);
}

// Whether `count` numbers, a multiple of 32, are neither infinite nor NaN.
inline bool finite(const bf16* p, int count) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 bad = 0;
    for (int i = 0; i < count; i += 32) {
        bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(p + i), exponent), exponent);
    }
    return bad == 0;
}

// Products of the rows of a tile with strips of 16 columns, several at a time: four for up to 16 rows, two for more.
// Rows of `a` lie `stride` bytes apart, a step further on is `advance` bytes.
struct Products {
    Tiles& tiles;
    int rows, depth, steps;
    const void* a;
    std::int64_t stride, advance;

    static int together(int rows) { return rows <= kTileRows ? 4 : 2; }

    // out[r][16 s + n] = sum of a[r] * b(s, step) over all steps, for strips s from 0 on. Rows of b lie `b_stride` bytes
    // apart, those of out `out_stride` floats.
    template <class B>
    void run(B&& b, std::int64_t b_stride, float* const* out, std::int64_t out_stride) const {
        if (rows <= kTileRows) {
            few(b, b_stride, out, 4 * out_stride);
        } else {
            many(b, b_stride, out, 4 * out_stride);
        }
    }

  private:
    template <class B>
    void few(B&& b, std::int64_t b_stride, float* const* out, std::int64_t out_stride) const {
        tiles.shape(rows, rows, depth);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const char* row = static_cast<const char*>(a);
        for (int step = 0; step < steps; ++step, row += advance) {
            _tile_loadd(4, row, stride);
            _tile_loadd(6, b(0, step), b_stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b(1, step), b_stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(6, b(2, step), b_stride);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, b(3, step), b_stride);
            _tile_dpbf16ps(3, 4, 7);
        }
        _tile_stored(0, out[0], out_stride);
        _tile_stored(1, out[1], out_stride);
        _tile_stored(2, out[2], out_stride);
        _tile_stored(3, out[3], out_stride);
    }

    template <class B>
    void many(B&& b, std::int64_t b_stride, float* const* out, std::int64_t out_stride) const {
        tiles.shape(kTileRows, rows - kTileRows, depth);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const char* upper = static_cast<const char*>(a);
        for (int step = 0; step < steps; ++step, upper += advance) {
            const char* lower = upper + kTileRows * stride;
            _tile_loadd(6, b(0, step), b_stride);
            _tile_loadd(4, upper, stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b(1, step), b_stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, lower, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        const std::int64_t down = kTileRows * out_stride / 4;
        _tile_stored(0, out[0], out_stride);
        _tile_stored(1, out[1], out_stride);
        _tile_stored(2, out[0] + down, out_stride);
        _tile_stored(3, out[1] + down, out_stride);
    }
};

// Makes bf16 of int8: a tile of `depth` rows of 32 elements, `stride` elements apart.
inline void widen_tile(const std::int8_t* from, std::int64_t stride, int depth, bf16* to) {
    const auto half = [](const std::int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    };
    for (int row = 0; row < depth; ++row, from += stride, to += 32) {
        const __m512bh both = _mm512_cvtne2ps_pbh(half(from + 16), half(from));
        std::memcpy(to, &both, sizeof both);
    }
}

template <class E>
class ByTiles {
  public:
    static std::int64_t bytes(int width) {
        const int own = kWhole ? kWide * kTileRows * kTileBytes : kEdges * 2 * kGroup * width;
        return 4 * kRows * kScoreStride + 2 * kRows * width + own;
    }

    ByTiles(void* memory, int width)
        : width_(width),
          scores_(static_cast<float*>(memory)),
          q_(reinterpret_cast<bf16*>(scores_ + kRows * kScoreStride)),
          own_(q_ + kRows * width) {}

    // What a score of `largest` less is weighed with. Scores are counted in powers of two.
    static F weight(F difference) { return exp2(difference); }

    // Row r of the tile is q[r], [width].
    void take(const bf16* const* q, int rows) {
        for (int row = 0; row < rows; ++row) std::memcpy(q_ + row * width_, q[row], 2 * width_);
    }

    void meet(const Span<E>& span, const Partial& to) {
        score(span);
        for (int row = 0; row < span.rows; ++row) weigh(span, row, to.largest[row], to.total[row]);
        add_weighted_values(span, to);
    }

  private:
    static constexpr bool kWhole = std::is_same_v<E, std::int8_t>;
    static constexpr int kEdges = 2;
    static constexpr int kWide = 8;
    static constexpr int kAhead = 8;  // groups

    void score(const Span<E>& span);
    void weigh(const Span<E>& span, int row, float& largest, float& total) const;
    void add_weighted_values(const Span<E>& span, const Partial& to);
    void add_finite_values(const Span<E>& span, const Partial& to);
    void add_values(const Span<E>& span, int first_row, int rows, int begin, int end, const E* const* values,
                    float* out);
    void ask_ahead(const Span<E>& span, int piece) const;

    // A tile of the cache as the tile unit loads it: `depth` rows of 32 elements, `stride` elements apart. Of the tiles
    // that become bf16 the last kWide are there.
    const bf16* tile(const E* from, std::int64_t stride, int depth, int number) const {
        if constexpr (kWhole) {
            bf16* wide = own_ + number % kWide * kTileRows * 32;
            widen_tile(from, stride, depth, wide);
            asm volatile("" ::: "memory");  // compilers do not know that loading a tile reads memory
            return wide;
        } else {
            return from;
        }
    }
    // Bytes from row to row of such a tile.
    static std::int64_t tile_stride(std::int64_t stride) { return kWhole ? kTileBytes : 2 * stride; }

    const bf16* only(Seen seen, int group, const bf16* values, bf16* edge) const;

    int width_;
    float* scores_;  // [kRows, kScoreStride]; weights as bf16 take the place of the scores
    bf16* q_;        // [kRows, width]
    bf16* own_;      // of bf16 [kEdges][kGroup / 2, width, 2], groups not all of whose tokens are seen; of int8 [kWide] tiles
    Tiles tiles_;
};

// Asks for a part of what is read some groups after number `piece` of the span's keys and then values, a line of each of
// several groups in turn.
template <class E>
[[gnu::always_inline]] inline void ByTiles<E>::ask_ahead(const Span<E>& span, int piece) const {
    const int count = span.end - span.begin, batch = (piece / kAhead + 1) * kAhead;
    constexpr int pairs = 2 / sizeof(E);  // of 16 tokens or dimensions, to a line
    const E* from[kAhead];
    int stride[kAhead];
    for (int one = 0; one < kAhead; ++one) {
        const int then = batch + one;
        stride[one] = pairs * (then < count || then >= 2 * count ? 2 * span.size : 32);
        if (then < count) {
            from[one] = span.keys[span.begin + then];
        } else if (then < 2 * count) {
            from[one] = span.values[span.begin + then - count];
        } else {
            from[one] = span.after[std::min(then - 2 * count, kBeyond - 1)];
        }
    }
    const int lines = width_ / 2 / pairs / kAhead, first = piece % kAhead * lines;
    for (int line = first; line < first + lines; ++line) {
        for (int one = 0; one < kAhead; ++one) prefetch_far(from[one] + line * stride[one]);
    }
}

template <class E>
void ByTiles<E>::score(const Span<E>& span) {
    const int depth = width_ % 32 == 0 ? 16 : 8;
    const Products products{tiles_, span.rows, depth, width_ / (2 * depth), q_, 2 * width_, 4 * depth};
    const int together = Products::together(span.rows);
    for (int group = span.begin / together * together; group < span.end; group += together) {
        float* out[4];
        for (int strip = 0; strip < 4; ++strip) out[strip] = scores_ + (group + strip) * kGroup;
        for (int one = std::max(group, span.begin); one < std::min(group + together, span.end); ++one) {
            ask_ahead(span, one - span.begin);
            if constexpr (kWhole) {
                prefetch(span.key_scales[one]);
                prefetch(span.value_scales[one]);
            }
        }
        const int stride = 2 * span.size;
        products.run(
            [&](int strip, int step) {
                return tile(span.keys[group + strip] + step * depth * stride, stride, depth, 4 * step + strip);
            },
            tile_stride(stride), out, kScoreStride);
    }
}

// Turns one row of scores into weights 2^(score - largest), as bf16 in the same memory. What the row does not see of the
// span's groups gets weight 0.
template <class E>
void ByTiles<E>::weigh(const Span<E>& span, int row, float& largest_score, float& total) const {
    constexpr float log2_e = 1.44269504f;
    const int begin = span.begin * kGroup, end = span.end * kGroup;
    const int low = std::min(span.seen[row].low, end), high = std::max(span.seen[row].high, low);
    float* scores = scores_ + row * kScoreStride;
    for (int p = begin; kWhole && p < end; p += kGroup) {
        store(scores + p, load(scores + p) * load(span.key_scales[p / kGroup]));
    }
    if (span.softcap > 0) cap(scores + begin, scores + end, span.scale, span.softcap);
    const F scale = set(span.softcap > 0 ? log2_e : span.scale * log2_e);
    std::fill(scores + begin, scores + low, kHidden);
    std::fill(scores + high, scores + end, kHidden);
    F most = set(kNever);
    for (int p = begin; p < end; p += kGroup) most = max(most, load(scores + p) * scale);
    largest_score = largest(most);

    const F less = set(-largest_score);
    F sums = zero();
    bf16* weights = reinterpret_cast<bf16*>(scores);  // never ahead of the scores that are still to be read
    for (int p = begin; p < end; p += kGroup) {
        const F score = load(scores + p), weight = exp2(fma(score, scale, less));
        sums = sums + weight;
        if constexpr (kWhole) {
            // Nobody knows the scale of a token that is not seen.
            const F scaled = weight * load(span.value_scales[p / kGroup]);
            store_rounded(weights + p, choose_less(set(kHidden), score, scaled, zero()));
        } else {
            store_rounded(weights + p, weight);
        }
    }
    total = sum(sums);
}

template <class E>
void ByTiles<E>::add_weighted_values(const Span<E>& span, const Partial& to) {
    if constexpr (kWhole) {  // whatever is not seen is finite
        add_values(span, 0, span.rows, span.begin, span.end, span.values, to.values);
    } else {
        add_finite_values(span, to);
    }
}

// The same for bf16, of which a value that is not seen may be anything.
template <class E>
void ByTiles<E>::add_finite_values(const Span<E>& span, const Partial& to) {
    const Seen first = span.seen[0], last = span.seen[span.rows - 1];
    const Seen some{std::max(span.begin * kGroup, first.low), std::min(span.end * kGroup, last.high)};
    const bf16* values[kGroups + kBeyond];
    std::copy(span.values, span.values + kGroups + kBeyond, values);
    // Nobody knows what is in the places that no row sees.
    const int begin = span.begin, end = span.end - 1;
    values[begin] = only(some, begin, values[begin], own_);
    if (end > begin) values[end] = only(some, end, values[end], own_ + kGroup * width_);
    // What only some rows see must not reach the others: 0 * NaN is NaN.
    bool clean = true;
    for (int group = begin; group <= end; ++group) {
        const int from = group * kGroup;
        const bool by_all = from >= last.low && from + kGroup <= first.high;
        if (!by_all && span.rows > 1 && !finite(values[group], kGroup * width_)) clean = false;
    }
    if (clean) return add_values(span, 0, span.rows, begin, span.end, values, to.values);
    for (int row = 0; row < span.rows; ++row) {
        const Seen seen = span.seen[row];
        float* out = to.values + row * width_;
        if (seen.nothing()) {
            std::fill_n(out, width_, 0.0f);
            continue;
        }
        const int from = seen.low / kGroup, until = (seen.high + kGroup - 1) / kGroup;
        std::copy(span.values, span.values + kGroups + kBeyond, values);
        values[from] = only(seen, from, values[from], own_);
        if (until - 1 > from) values[until - 1] = only(seen, until - 1, values[until - 1], own_ + kGroup * width_);
        add_values(span, row, 1, from, until, values, out);
    }
}

// The values of a group with zeros for the tokens that are not seen: as they lie in the cache, or a copy.
template <class E>
const bf16* ByTiles<E>::only(Seen seen, int group, const bf16* values, bf16* edge) const {
    const int low = seen.low - group * kGroup, high = seen.high - group * kGroup;
    if (low <= 0 && high >= kGroup) return values;
    for (int pair = 0; pair < kGroup / 2; ++pair) {
        const bool first = low <= 2 * pair && 2 * pair < high, second = low <= 2 * pair + 1 && 2 * pair + 1 < high;
        const I kept = iset(static_cast<std::int32_t>((first ? 0x0000ffffu : 0) | (second ? 0xffff0000u : 0)));
        for (int at = pair * 2 * width_; at < (pair + 1) * 2 * width_; at += 32) {
            store_bytes(edge + at, load_bytes(values + at) & kept);
        }
    }
    return edge;
}

// out[r] = the sum of weights[first_row + r] * values over the groups of [begin, end).
template <class E>
void ByTiles<E>::add_values(const Span<E>& span, int first_row, int rows, int begin, int end, const E* const* values,
                            float* out) {
    const bf16* weights = reinterpret_cast<const bf16*>(scores_) + first_row * kWeightStride + begin * kGroup;
    // A group is half as deep as a tile may be, but the next one may lie anywhere.
    const Products products{tiles_, rows, kGroup / 2, end - begin, weights, 2 * kWeightStride, 2 * kGroup};
    const int together = Products::together(rows), strips = width_ / 16;
    for (int strip = 0; strip < strips; strip += together) {
        int column[4];
        float* to[4];
        for (int one = 0; one < 4; ++one) {
            column[one] = 16 * std::min(strip + one, strips - 1);  // what is too much computes the last once more
            to[one] = out + column[one];
        }
        products.run(
            [&](int one, int step) {
                if (one == 0 && strip == 0) ask_ahead(span, span.end - 2 * span.begin + begin + step);
                return tile(values[begin + step] + 2 * column[one], 2 * width_, kGroup / 2, 4 * step + one);
            },
            tile_stride(2 * width_), to, width_);
    }
}

}  // namespace tokenmill::TOKENMILL_ISA
