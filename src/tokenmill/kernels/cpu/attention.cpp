// Attention is cut by query and by position. A *tile* is up to 12 query rows (queries times the heads that share a KV
// head) of one sequence; a *span* is 512 positions, counted from position 0. A tile meets a span in two passes: all scores
// and their weights first, then the weighted sum of values. Spans are computed from nothing and merged in the order of
// their positions, so a long context can be spread over threads, and a query's result depends on nothing but what it sees.
#include "attention.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "threads.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int kRows = 12;                  // with two vectors beside them they fill the 32 registers
constexpr int kSpan = 512;                 // 12 rows of scores stay in the first-level cache
constexpr int kGroup = 16;                 // tokens of one vector of scores
constexpr int kGroups = kSpan / kGroup;
constexpr int kScoreStride = kSpan + 16;   // not a power of two: rows must not compete for the same cache sets
constexpr int kWeightStride = 2 * kScoreStride;
constexpr float kNever = -1e30f;           // start of a maximum; finite, so that its difference to itself is not NaN
constexpr float kHidden = -INFINITY;

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

std::uint32_t pair_at(const bf16* weights, int position) {
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

struct Tile {
    int row, head;     // the sequence and the KV head
    int first, count;  // query rows: number i is query i / group of the sequence and head i % group of the KV head's
    int begin, end;    // the spans they see
    std::int64_t partial;  // where the results of its spans go when they are computed apart, else -1
};

struct Task {
    int tile;
    int span;  // -1: all spans of the tile
};

// Positions [low, high) that a query row sees.
struct Seen {
    int low, high;
    bool nothing() const { return low >= high; }
};

// Softmax statistics and values of a tile's rows, not yet divided by the sum.
struct Partial {
    float* largest;  // [kRows]
    float* total;    // [kRows]
    float* values;   // [rows, width]

    static std::int64_t floats(int width) { return 2 * 16 + static_cast<std::int64_t>(kRows) * width; }
    static Partial at(float* memory) { return {memory, memory + 16, memory + 32}; }
    void clear(int rows, int width) const {
        std::fill_n(largest, rows, kNever);
        std::fill_n(total, rows, 0.0f);
        std::fill_n(values, static_cast<std::int64_t>(rows) * width, 0.0f);
    }
};

float exp_of(float x) {
    float lanes[16];
    store(lanes, exp(set(x)));
    return lanes[0];
}

// What a thread computes a tile in.
struct Workspace {
    float* scores;     // [kRows, kScoreStride]; weights as bf16 take the place of the scores
    std::uint32_t* q;  // [width / 2, rows]
    bf16* edge;        // [width, 2]: a pair of tokens of which only one is seen
    Partial state, part;

    static std::int64_t bytes(int width) {
        return 4 * (kRows * kScoreStride + kRows * width / 2 + width + 2 * Partial::floats(width));
    }
    Workspace(void* memory, int width) {
        scores = static_cast<float*>(memory);
        q = reinterpret_cast<std::uint32_t*>(scores + kRows * kScoreStride);
        edge = reinterpret_cast<bf16*>(q + kRows * width / 2);
        float* rest = reinterpret_cast<float*>(edge) + width;
        state = Partial::at(rest);
        part = Partial::at(rest + Partial::floats(width));
    }
};

class Attention {
  public:
    explicit Attention(const PagedAttention& call)
        : call_(call), width_(call.cache.width), group_(call.q_heads / call.cache.heads) {}

    void run();

  private:
    void plan();
    void all_spans(const Tile& tile, Workspace& work) const;
    void one_span(const Tile& tile, int span, Workspace& work, const Partial& to) const;
    void merge_spans(const Tile& tile, Workspace& work) const;

    void pack_queries(const Tile& tile, std::uint32_t* q) const;
    Seen seen(const Tile& tile, int index, int span) const;
    void weigh(float* scores, Seen seen, float& largest, float& total) const;
    void weighted_values(const Tile& tile, const Seen* seen, const bf16* const* values, Workspace& work,
                         const Partial& to) const;
    void add_row(const bf16* weights, Seen seen, const bf16* const* values, bf16* edge, float* out) const;
    void merge(const Partial& state, const Partial& part, int rows) const;
    void finish(const Tile& tile, const Partial& state) const;

    Partial partial(const Tile& tile, int span) const {
        return Partial::at(partials_ + tile.partial + (span - tile.begin) * Partial::floats(width_));
    }
    int queries(int row) const { return call_.query_start[row + 1] - call_.query_start[row]; }
    std::int64_t query_offset(const Tile& tile, int index) const {
        const std::int64_t token = call_.query_start[tile.row] + (tile.first + index) / group_;
        return (token * call_.q_heads + tile.head * group_ + (tile.first + index) % group_) * width_;
    }

    const PagedAttention& call_;
    const int width_, group_;
    std::vector<Tile> tiles_;
    std::vector<Task> tasks_;
    std::vector<Task> merges_;   // one per tile whose spans are computed apart
    float* partials_ = nullptr;  // of those spans
};

// What a query row sees of a span, relative to the span's start.
Seen Attention::seen(const Tile& tile, int index, int span) const {
    const int position = call_.context_lens[tile.row] - queries(tile.row) + (tile.first + index) / group_;
    const int low = call_.window > 0 ? std::max(0, position - call_.window + 1) : 0;
    return {std::max(low - span * kSpan, 0), std::min(position + 1 - span * kSpan, kSpan)};
}

void Attention::plan() {
    int spans = 0;
    for (int row = 0; row < call_.rows; ++row) {
        const int all = queries(row) * group_;
        if (all == 0) continue;
        const int count = (all + kRows - 1) / kRows;
        // Tiles of a head follow each other, so that its keys and values stay in the second-level cache.
        for (int head = 0; head < call_.cache.heads; ++head) {
            for (int index = 0; index < count; ++index) {
                const int first = static_cast<int>(static_cast<std::int64_t>(all) * index / count);
                const int next = static_cast<int>(static_cast<std::int64_t>(all) * (index + 1) / count);
                Tile tile{row, head, first, next - first, 0, 0, -1};
                tile.begin = seen(tile, 0, 0).low / kSpan;
                tile.end = (call_.context_lens[row] - queries(row) + (next - 1) / group_) / kSpan + 1;
                spans += tile.end - tile.begin;
                tiles_.push_back(tile);
            }
        }
    }
    // A tile with a large part of all work is computed span by span. The results are the same.
    const int most = std::max(1, spans / (4 * thread_count()));
    std::int64_t floats = 0;
    for (int index = 0; index < static_cast<int>(tiles_.size()); ++index) {
        Tile& tile = tiles_[index];
        if (tile.end - tile.begin <= most || thread_count() == 1) {
            tasks_.push_back({index, -1});
            continue;
        }
        merges_.push_back({index, -1});
        tile.partial = floats;
        floats += (tile.end - tile.begin) * Partial::floats(width_);
        for (int span = tile.begin; span < tile.end; ++span) tasks_.push_back({index, span});
    }
    if (floats > 0) partials_ = static_cast<float*>(caller_scratch(floats * sizeof(float)));
}

void Attention::run() {
    const int owned = call_.rows > 0 ? call_.query_start[call_.rows] : 0;
    const std::int64_t per_token = static_cast<std::int64_t>(call_.q_heads) * width_;
    std::memset(call_.out + owned * per_token, 0, (call_.tokens - owned) * per_token * sizeof(bf16));
    plan();
    parallel(static_cast<int>(tasks_.size()), [&](int index, int thread) {
        const Task task = tasks_[index];
        const Tile& tile = tiles_[task.tile];
        Workspace work(scratch(thread, Workspace::bytes(width_)), width_);
        if (task.span < 0) return all_spans(tile, work);
        pack_queries(tile, work.q);
        one_span(tile, task.span, work, partial(tile, task.span));
    });
    parallel(static_cast<int>(merges_.size()), [&](int index, int thread) {
        Workspace work(scratch(thread, Workspace::bytes(width_)), width_);
        merge_spans(tiles_[merges_[index].tile], work);
    });
}

void Attention::all_spans(const Tile& tile, Workspace& work) const {
    pack_queries(tile, work.q);
    work.state.clear(tile.count, width_);
    for (int span = tile.begin; span < tile.end; ++span) {
        one_span(tile, span, work, work.part);
        merge(work.state, work.part, tile.count);
    }
    finish(tile, work.state);
}

void Attention::merge_spans(const Tile& tile, Workspace& work) const {
    work.state.clear(tile.count, width_);
    for (int span = tile.begin; span < tile.end; ++span) {
        merge(work.state, partial(tile, span), tile.count);
    }
    finish(tile, work.state);
}

void Attention::pack_queries(const Tile& tile, std::uint32_t* q) const {
    for (int index = 0; index < tile.count; ++index) {
        const bf16* from = call_.q + query_offset(tile, index);
        for (int pair = 0; pair < width_ / 2; ++pair) q[pair * tile.count + index] = pair_at(from, 2 * pair);
    }
}

void Attention::one_span(const Tile& tile, int span, Workspace& work, const Partial& to) const {
    Seen rows[kRows];
    int low = kSpan, high = 0;
    for (int index = 0; index < tile.count; ++index) {
        rows[index] = seen(tile, index, span);
        if (rows[index].nothing()) continue;
        low = std::min(low, rows[index].low);
        high = std::max(high, rows[index].high);
    }
    const int begin = low / kGroup, end = (high + kGroup - 1) / kGroup;

    const bf16* keys[kGroups + kMostVectors];
    const bf16* values[kGroups + kMostVectors];
    const KVBlocks& cache = call_.cache;
    const std::int32_t* table = call_.block_table + tile.row * call_.table_stride;
    for (int group = begin; group < end; ++group) {
        const int position = span * kSpan + group * kGroup;
        const int block = table[position / cache.size], place = position % cache.size;
        const std::int64_t offset = cache.offset(block, tile.head);
        keys[group] = cache.keys + offset + 2 * place;
        values[group] = cache.values + offset + place * width_;
    }
    // The kernels always take full numbers of groups. What is too much repeats the last one, and its scores are never
    // looked at: past a row's end they fall on places of the next row that lie before `begin`.
    std::fill_n(keys + end, kMostVectors, keys[end - 1]);
    std::fill_n(values + end, kMostVectors, values[end - 1]);
    const int step = vectors_for(tile.count);
    for (int group = begin; group < end; group += step) {
        const bf16* const* next = group + step < end ? keys + group + step : values + begin;
        kScore[tile.count - 1](work.q, width_ / 2, keys + group, next, 2 * cache.size, call_.scale,
                               work.scores + group * kGroup);
    }
    for (int index = 0; index < tile.count; ++index) {
        weigh(work.scores + index * kScoreStride, rows[index], to.largest[index], to.total[index]);
    }
    weighted_values(tile, rows, values, work, to);
}

// Turns one row of scores into weights exp(score - largest), as bf16 in the same memory. Places in the row's first and
// last vector that it does not see get weight 0.
void Attention::weigh(float* scores, Seen seen, float& largest_score, float& total) const {
    largest_score = kNever;
    total = 0;
    if (seen.nothing()) return;
    const int begin = seen.low / kGroup * kGroup, end = (seen.high + kGroup - 1) / kGroup * kGroup;
    if (call_.softcap > 0) {
        // cap * tanh(s / cap), with tanh(x) = 1 - 2 / (1 + exp(2x))
        const F cap = set(call_.softcap), twice = set(2 / call_.softcap), one = set(1), two = set(2);
        for (int p = begin; p < end; p += kGroup) {
            store(scores + p, cap * (one - two / (one + exp(load(scores + p) * twice))));
        }
    }
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

void Attention::weighted_values(const Tile& tile, const Seen* seen, const bf16* const* values, Workspace& work,
                                const Partial& to) const {
    const auto* weights = reinterpret_cast<const bf16*>(work.scores);
    std::fill_n(to.values, tile.count * width_, 0.0f);
    // What all rows see, in whole pairs, is read once for all of them; before and after it each row is on its own.
    const int begin = (seen[tile.count - 1].low + 1) / 2 * 2, end = seen[0].high / 2 * 2;
    if (begin >= end) {
        for (int index = 0; index < tile.count; ++index) {
            add_row(weights + index * kWeightStride, seen[index], values, work.edge, to.values + index * width_);
        }
        return;
    }
    for (int index = 0; index < tile.count; ++index) {
        const Seen before{seen[index].low, begin};
        add_row(weights + index * kWeightStride, before, values, work.edge, to.values + index * width_);
    }
    kAddValues[tile.count - 1](weights, values, width_, begin, end, to.values);
    for (int index = 0; index < tile.count; ++index) {
        const Seen after{end, seen[index].high};
        add_row(weights + index * kWeightStride, after, values, work.edge, to.values + index * width_);
    }
}

// One row by itself. A pair of tokens of which it sees one is read from a copy in which the other is 0: the unseen token
// has weight 0, but 0 * NaN is NaN.
void Attention::add_row(const bf16* weights, Seen seen, const bf16* const* values, bf16* edge, float* out) const {
    if (seen.nothing()) return;
    const auto add_half = [&](int position) {
        const int pair = position / 2 * 2;
        const bf16* from = values[pair / kGroup] + pair % kGroup * width_;
        for (int d = 0; d < width_; ++d) {
            edge[2 * d] = position == pair ? from[2 * d] : bf16{0};
            edge[2 * d + 1] = position == pair ? bf16{0} : from[2 * d + 1];
        }
        const bf16* only = edge - pair % kGroup * width_;
        const bf16* groups[kGroups + kAhead];
        groups[pair / kGroup] = groups[pair / kGroup + kAhead] = only;
        kAddValues[0](weights, groups, width_, pair, pair + 2, out);
    };
    if (seen.low % 2 == 1) add_half(seen.low++);
    const int whole = seen.high / 2 * 2;
    if (seen.low < whole) kAddValues[0](weights, values, width_, seen.low, whole, out);
    if (seen.high % 2 == 1 && seen.low < seen.high) add_half(seen.high - 1);
}

// Adds a later span to what was before it. To nothing it adds itself exactly.
void Attention::merge(const Partial& state, const Partial& part, int rows) const {
    for (int row = 0; row < rows; ++row) {
        const float most = std::max(state.largest[row], part.largest[row]);
        const float before = exp_of(state.largest[row] - most), now = exp_of(part.largest[row] - most);
        state.largest[row] = most;
        state.total[row] = state.total[row] * before + part.total[row] * now;
        float* values = state.values + row * width_;
        const float* added = part.values + row * width_;
        for (int d = 0; d < width_; d += 16) {
            store(values + d, fma(load(added + d), set(now), load(values + d) * set(before)));
        }
    }
}

void Attention::finish(const Tile& tile, const Partial& state) const {
    for (int index = 0; index < tile.count; ++index) {
        const F total = set(state.total[index]);
        bf16* out = call_.out + query_offset(tile, index);
        for (int d = 0; d < width_; d += 16) store(out + d, load(state.values + index * width_ + d) / total);
    }
}

}  // namespace

void paged_attention(const PagedAttention& call) { Attention(call).run(); }

}  // namespace tokenmill::TOKENMILL_ISA
