// Attention is cut by query and by position. A *tile* is a few query rows (queries times the heads that share a KV head)
// of one sequence; a *span* is 512 positions, counted from position 0. Spans are computed from nothing and merged in the
// order of their positions, so a long context can be spread over threads, and a query's result depends on nothing but
// what it sees.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "attention_span.h"
#include "threads.h"
#include "vec.h"
#if defined(__AMX_TILE__)
#include "attention_tiles.h"
#else
#include "attention_whole.h"
#endif

namespace tokenmill::TOKENMILL_ISA {
namespace {

#if defined(__AMX_TILE__)
template <class E>
using WayOf = ByTiles<E>;
#else
template <class E>
using WayOf = std::conditional_t<std::is_same_v<E, bf16>, ByVectors, ByWholeNumbers>;
#endif

struct Tile {
    int row, head;     // the sequence and the KV head
    int first, count;  // query rows: number i is query i / group of the sequence and head i % group of the KV head's
    int begin, end;    // the spans they see
    std::int64_t partial;  // where the results of its spans go when they are computed apart, else -1
};

// Some spans of a tile, or all of them.
struct Task {
    int tile;
    int begin, end;
};

// What a thread computes a tile in.
template <class Way>
struct Workspace {
    Way way;
    Partial state, part;

    static std::int64_t bytes(int width) { return Way::bytes(width) + 2 * 4 * Partial::floats(width); }
    Workspace(void* memory, int width)
        : way(memory, width),
          state(Partial::at(reinterpret_cast<float*>(static_cast<char*>(memory) + Way::bytes(width)))),
          part(Partial::at(state.largest + Partial::floats(width))) {}
};

// Over a cache of elements E, bf16 or int8.
template <class E>
class Attention {
    using Way = WayOf<E>;
    using Workspace = tokenmill::TOKENMILL_ISA::Workspace<Way>;

  public:
    explicit Attention(const PagedAttention& call)
        : call_(call), width_(call.cache.width), group_(call.q_heads / call.cache.heads) {}

    void run();

  private:
    void plan();
    void meet_spans(const Task& task, const Task& then, Workspace& work) const;
    void merge_spans(const Tile& tile, Workspace& work) const;
    void take_queries(const Tile& tile, Way& way) const;
    Seen seen(const Tile& tile, int index, int span) const;
    Span<E> span_of(const Tile& tile, int number) const;
    void first_keys(const Tile& tile, int number, const E** keys) const;
    template <class Found>
    void find_groups(const Tile& tile, int number, int begin, int end, Found&& found) const;
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
    std::vector<int> merges_;    // tiles whose spans are computed apart
    float* partials_ = nullptr;  // of those spans
};

template <class E>
void Attention<E>::run() {
    const int owned = call_.rows > 0 ? call_.query_start[call_.rows] : 0;
    const std::int64_t per_token = static_cast<std::int64_t>(call_.q_heads) * width_;
    std::memset(call_.out + owned * per_token, 0, (call_.tokens - owned) * per_token * sizeof(bf16));
    plan();
    const int tasks = static_cast<int>(tasks_.size());
    parallel(tasks, [&](int index, int thread) {
        Workspace work(scratch(thread, Workspace::bytes(width_)), width_);
        const int next = std::min(index + 1, tasks - 1);  // probably this thread's
        meet_spans(tasks_[index], tasks_[next], work);
    });
    parallel(static_cast<int>(merges_.size()), [&](int index, int thread) {
        Workspace work(scratch(thread, Workspace::bytes(width_)), width_);
        merge_spans(tiles_[merges_[index]], work);
    });
}

template <class E>
void Attention<E>::plan() {
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
    // A tile with a large part of all work is computed in pieces. The results are the same.
    const int most = std::max(1, spans / (4 * thread_count()));
    std::int64_t floats = 0;
    for (int index = 0; index < static_cast<int>(tiles_.size()); ++index) {
        Tile& tile = tiles_[index];
        const int count = tile.end - tile.begin;
        const bool whole = count <= most || thread_count() == 1;
        const int piece = whole ? count : most;
        for (int span = tile.begin; span < tile.end; span += piece) {
            tasks_.push_back({index, span, std::min(span + piece, tile.end)});
        }
        if (whole) continue;
        merges_.push_back(index);
        tile.partial = floats;
        floats += count * Partial::floats(width_);
    }
    if (floats > 0) partials_ = static_cast<float*>(caller_scratch(floats * sizeof(float)));
}

template <class E>
void Attention<E>::meet_spans(const Task& task, const Task& next, Workspace& work) const {
    const Tile& tile = tiles_[task.tile];
    take_queries(tile, work.way);
    for (int number = task.begin; number < task.end; ++number) {
        Span<E> span = span_of(tile, number);
        if (number + 1 < task.end) {
            first_keys(tile, number + 1, span.after);
        } else {
            first_keys(tiles_[next.tile], next.begin, span.after);
        }
        if (tile.partial >= 0) {
            work.way.meet(span, partial(tile, number));
        } else if (number == task.begin) {
            work.way.meet(span, work.state);
        } else {
            work.way.meet(span, work.part);
            merge(work.state, work.part, tile.count);
        }
    }
    if (tile.partial < 0) finish(tile, work.state);
}

template <class E>
void Attention<E>::merge_spans(const Tile& tile, Workspace& work) const {
    work.state.clear(tile.count, width_);
    for (int number = tile.begin; number < tile.end; ++number) merge(work.state, partial(tile, number), tile.count);
    finish(tile, work.state);
}

template <class E>
void Attention<E>::take_queries(const Tile& tile, Way& way) const {
    const bf16* rows[kRows];
    for (int index = 0; index < tile.count; ++index) rows[index] = call_.q + query_offset(tile, index);
    way.take(rows, tile.count);
}

// What a query row sees of a span.
template <class E>
Seen Attention<E>::seen(const Tile& tile, int index, int number) const {
    const int position = call_.context_lens[tile.row] - queries(tile.row) + (tile.first + index) / group_;
    const int low = call_.window > 0 ? std::max(0, position - call_.window + 1) : 0;
    return {std::max(low - number * kSpan, 0), std::min(position + 1 - number * kSpan, kSpan)};
}

template <class E>
Span<E> Attention<E>::span_of(const Tile& tile, int number) const {
    Span<E> span;
    span.rows = tile.count;
    span.width = width_;
    span.size = call_.cache.size;
    span.scale = call_.scale;
    span.softcap = call_.softcap;
    int low = kSpan, high = 0;
    for (int index = 0; index < tile.count; ++index) {
        const Seen seen = span.seen[index] = this->seen(tile, index, number);
        if (seen.nothing()) continue;
        low = std::min(low, seen.low);
        high = std::max(high, seen.high);
    }
    span.begin = low / kGroup;
    span.end = (high + kGroup - 1) / kGroup;
    find_groups(tile, number, span.begin, span.end, [&](int group, const char* keys, const char* values, int place) {
        span.keys[group] = reinterpret_cast<const E*>(keys) + 2 * place;
        span.values[group] = reinterpret_cast<const E*>(values) + place * width_;
        if constexpr (std::is_same_v<E, std::int8_t>) {
            const int elements = span.size * width_;
            span.key_scales[group] = reinterpret_cast<const float*>(keys + elements) + place;
            span.value_scales[group] = reinterpret_cast<const float*>(values + elements) + place;
        }
    });
    for (auto& lie : {span.keys, span.values}) {
        std::fill_n(lie, span.begin, lie[span.begin]);
        std::fill_n(lie + span.end, kGroups + kBeyond - span.end, lie[span.end - 1]);
    }
    return span;
}

// The first keys of a span that a tile sees.
template <class E>
void Attention<E>::first_keys(const Tile& tile, int number, const E** keys) const {
    const int begin = seen(tile, 0, number).low / kGroup;
    const int end = (seen(tile, tile.count - 1, number).high + kGroup - 1) / kGroup;
    const int count = std::min(end - begin, kBeyond);
    find_groups(tile, number, begin, begin + count, [&](int group, const char* from, const char*, int place) {
        keys[group - begin] = reinterpret_cast<const E*>(from) + 2 * place;
    });
    std::fill_n(keys + count, kBeyond - count, keys[count - 1]);
}

// Calls found(group, keys of its block and head, values, the place of its first token there) for groups of a span.
template <class E>
template <class Found>
void Attention<E>::find_groups(const Tile& tile, int number, int begin, int end, Found&& found) const {
    const KVBlocks& cache = call_.cache;
    const int position = number * kSpan + begin * kGroup;
    const std::int32_t* block = call_.block_table + tile.row * call_.table_stride + position / cache.size;
    int place = position % cache.size;
    for (int group = begin; group < end; ++group) {
        const std::int64_t offset = cache.offset(*block, tile.head);
        found(group, cache.keys + offset, cache.values + offset, place);
        place += kGroup;
        if (place == cache.size) {
            place = 0;
            ++block;
        }
    }
}

// Adds a later span to what was before it. To nothing it adds itself exactly.
template <class E>
void Attention<E>::merge(const Partial& state, const Partial& part, int rows) const {
    float before[kRowLanes], now[kRowLanes];
    for (int row = 0; row < rows; row += 16) {
        const F old = load(state.largest + row), added = load(part.largest + row), most = max(old, added);
        const F of_old = Way::weight(old - most), of_added = Way::weight(added - most);
        store(before + row, of_old);
        store(now + row, of_added);
        store(state.largest + row, most);
        store(state.total + row, load(state.total + row) * of_old + load(part.total + row) * of_added);
    }
    for (int row = 0; row < rows; ++row) {
        float* values = state.values + row * width_;
        const float* added = part.values + row * width_;
        for (int d = 0; d < width_; d += 16) {
            store(values + d, fma(load(added + d), set(now[row]), load(values + d) * set(before[row])));
        }
    }
}

template <class E>
void Attention<E>::finish(const Tile& tile, const Partial& state) const {
    for (int index = 0; index < tile.count; ++index) {
        const F total = set(state.total[index]);
        const float* values = state.values + index * width_;
        bf16* out = call_.out + query_offset(tile, index);
        // What a query does not see may have turned -0 into 0: both shall give the same.
        for (int d = 0; d < width_; d += 16) store(out + d, (load(values + d) + zero()) / total);
    }
}

}  // namespace

void paged_attention(const PagedAttention& call) {
    if (call.cache.format == KVFormat::int8) {
        Attention<std::int8_t>(call).run();
    } else {
        Attention<bf16>(call).run();
    }
}

}  // namespace tokenmill::TOKENMILL_ISA
