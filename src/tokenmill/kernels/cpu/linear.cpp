#include "linear.h"

#include "linear_int4.h"
#include "linear_rows.h"
#include "linear_tiles.h"
#include "linear_widened.h"
#include "threads.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Register blocking: rows times the two vectors of a panel, as sums, fill the registers.
#if defined(__AVX512F__)
constexpr int kRows = 12;
constexpr int kThin = 3;  // rows up to which there are registers for four panels at once, more streams from memory
#else
constexpr int kRows = 2;
constexpr int kThin = 0;
#endif
constexpr int kUnit = 4;  // panels of a task at most
constexpr int kUnpacking = kRows < 8 ? kRows : 8;  // rows up to which int4 is unpacked in registers
constexpr int kTasks = 16;   // per thread, if there are enough panels: few enough that a task reads on and on
constexpr std::int64_t kNearRows = 1 << 19;  // bytes of rows that stay in the second-level cache,
constexpr int kLeastRows = 96;               // and rows that are too few to read all panels for
constexpr int kNear = 4096;  // bytes to ask for ahead of time where weights come from memory and are used once

template <class T>
T read(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}

// Results of a block of rows for the panels of a task.
using Tile = float[kRows][kUnit * kPanel];

// The weights to ask memory for while others are in use.
struct Ahead {
    int near;            // this many bytes further on in each panel,
    const char* next;    // and from here on
    std::int64_t pace;   // so many bytes per step, a line at most
};

// ---- dot products: R rows with P panels, into a tile ----

template <int R, int P>
void dots_bf16(const Weight& w, int panel, const Rows& rows, int row, int column, Ahead ahead, Tile& tile) {
    const int steps = w.depth / 2;
    const std::int64_t panel_size = std::int64_t{steps} * 64;
    const bf16* weights = static_cast<const bf16*>(w.data) + panel * panel_size;
    const char* x = static_cast<const char*>(rows.data) + row * rows.stride;
    F sum[R][2 * P];
    for (auto& of_row : sum) {
        for (auto& one : of_row) one = zero();
    }
    for (int step = 0; step < steps; ++step, weights += 64, x += 4, ahead.next += ahead.pace) {
        prefetch_far(ahead.next);
        I vectors[2 * P];
        for (int v = 0; v < 2 * P; ++v) {
            const bf16* vector = weights + v / 2 * panel_size + v % 2 * 32;
            prefetch(reinterpret_cast<const char*>(vector) + ahead.near);
            vectors[v] = load_bytes(vector);
        }
        for (int r = 0; r < R; ++r) {
            const auto pair = read<std::uint32_t>(x + r * rows.stride);
            for (int v = 0; v < 2 * P; ++v) sum[r][v] = dot_bf16(sum[r][v], vectors[v], pair);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < 2 * P; ++v) store(&tile[r][column + 16 * v], sum[r][v]);
    }
}

// Scales integer sums of (w + 128) * x.
template <int R, int V>
void scale(const Weight& w, int panel, const Rows& rows, int row, int column, const I (&sum)[R][V], Tile& tile) {
    for (int v = 0; v < V; ++v) {
        const F of_output = load(w.scales + panel * kPanel + 16 * v);
        for (int r = 0; r < R; ++r) {
            const I exact = sum[r][v] + iset(-128 * rows.sums[row + r]);
            store(&tile[r][column + 16 * v], to_float(exact) * of_output * set(rows.scales[row + r]));
        }
    }
}

// `data` holds the bytes of this panel and those after it.
template <int R, int P>
void dots_int8(const Weight& w, const std::uint8_t* data, int panel, const Rows& rows, int row, int column,
               Ahead ahead, Tile& tile) {
    const int steps = w.depth / 4;
    const std::int64_t panel_size = std::int64_t{steps} * 128;
    const char* x = static_cast<const char*>(rows.data) + row * rows.stride;
    I sum[R][2 * P];
    for (auto& of_row : sum) {
        for (auto& one : of_row) one = izero();
    }
    for (int step = 0; step < steps; ++step, data += 128, x += 4, ahead.next += ahead.pace) {
        prefetch_far(ahead.next);
        I vectors[2 * P];
        for (int v = 0; v < 2 * P; ++v) {
            const std::uint8_t* vector = data + v / 2 * panel_size + v % 2 * 64;
            prefetch(vector + ahead.near);
            vectors[v] = load_bytes(vector);
        }
        for (int r = 0; r < R; ++r) {
            const auto quad = read<std::int32_t>(x + r * rows.stride);
            for (int v = 0; v < 2 * P; ++v) sum[r][v] = dot_u8s8(sum[r][v], vectors[v], quad);
        }
    }
    scale<R, 2 * P>(w, panel, rows, row, column, sum, tile);
}

template <int R>
void dots_int4(const Weight& w, int panel, const Rows& rows, int row, int column, Tile& tile) {
    const int groups = w.depth / w.group, steps = w.group / 8;
    const auto* data = static_cast<const std::uint8_t*>(w.data) + std::int64_t{panel} * w.depth * 16;
    const char* x = static_cast<const char*>(rows.data) + row * rows.stride;
    I sum[R][2];
    for (auto& of_row : sum) {
        for (auto& one : of_row) one = izero();
    }
    const std::uint8_t* offsets = w.offsets != nullptr ? w.offsets : w.multipliers;
    const int near = (kNear / 16 + w.group - 1) / w.group * kPanel;  // as far ahead as in the data
    for (int group = 0; group < groups; ++group) {
        const std::int64_t place = (std::int64_t{panel} * groups + group) * kPanel;
        prefetch(w.multipliers + place + near);
        prefetch(offsets + place + near);
        const Group g[2] = {load_group(w, place), load_group(w, place + 16)};
        for (int step = 0; step < steps; ++step, data += 128, x += 8) {
            for (int v = 0; v < 2; ++v) {
                prefetch(data + 64 * v + kNear);
                I first, second;
                unpack(load_bytes(data + 64 * v), g[v], first, second);
                for (int r = 0; r < R; ++r) {
                    sum[r][v] = dot_u8s8(sum[r][v], first, read<std::int32_t>(x + r * rows.stride));
                    sum[r][v] = dot_u8s8(sum[r][v], second, read<std::int32_t>(x + r * rows.stride + 4));
                }
            }
        }
    }
    scale<R, 2>(w, panel, rows, row, column, sum, tile);
}

// A panel of int4 as a panel of int8.
void unpack_panel(const Weight& w, int panel, std::uint8_t* out) {
    const int groups = w.depth / w.group, steps = w.group / 8;
    const auto* data = static_cast<const std::uint8_t*>(w.data) + std::int64_t{panel} * w.depth * 16;
    for (int group = 0; group < groups; ++group) {
        const std::int64_t place = (std::int64_t{panel} * groups + group) * kPanel;
        const Group g[2] = {load_group(w, place), load_group(w, place + 16)};
        for (int step = 0; step < steps; ++step, data += 128, out += 256) {
            for (int v = 0; v < 2; ++v) {
                prefetch(data + 64 * v + kNear);
                I first, second;
                unpack(load_bytes(data + 64 * v), g[v], first, second);
                store_bytes(out + 64 * v, first);
                store_bytes(out + 128 + 64 * v, second);
            }
        }
    }
}

// ---- the right number of rows and panels, known to the compiler ----

struct Block {
    const Weight& w;
    const Rows& rows;
    const std::uint8_t* unpacked;  // int4 of many rows: the panels of the unit as int8
    int first_panel, panels;       // of the unit
    int row;
    Ahead ahead;

    template <int R, int P>
    void dots(int panel, Tile& tile) const {
        const int column = (panel - first_panel) * kPanel;
        switch (w.format) {
            case Format::bf16:
                return dots_bf16<R, P>(w, panel, rows, row, column, ahead_at(panel, w.depth / 2), tile);
            case Format::int8:
                return dots_int8<R, P>(w, static_cast<const std::uint8_t*>(w.data) + std::int64_t{panel} * w.depth * kPanel,
                                       panel, rows, row, column, ahead_at(panel, w.depth / 4), tile);
            case Format::int4:
                if (unpacked != nullptr) {
                    return dots_int8<R, P>(w, unpacked + std::int64_t{column} * w.depth, panel, rows, row, column,
                                           ahead_at(panel, w.depth / 4), tile);
                }
                for (int one = 0; one < P; ++one) dots_int4<R>(w, panel + one, rows, row, column + one * kPanel, tile);
        }
    }

    Ahead ahead_at(int panel, int steps) const {
        return {ahead.near, ahead.next + (panel - first_panel) * steps * ahead.pace, ahead.pace};
    }

    template <int R>
    void all_panels(Tile& tile) const {
        int panel = first_panel;
        const int end = first_panel + panels;
        if constexpr (R <= kThin) {
            for (; panel + 4 <= end; panel += 4) dots<R, 4>(panel, tile);
            for (; panel + 2 <= end; panel += 2) dots<R, 2>(panel, tile);
        }
        for (; panel < end; ++panel) dots<R, 1>(panel, tile);
    }

    template <int R = kRows>
    void run(int count, Tile& tile) const {
        if (count == R) return all_panels<R>(tile);
        if constexpr (R > 1) run<R - 1>(count, tile);
    }
};

// ---- results ----

void put(bf16* out, F value) { store(out, value); }
void put(float* out, F value) { store(out, value); }

// Writes the first `count` of 16 lanes.
template <class T>
void put_some(T* out, F value, int count) {
    if (count >= 16) return put(out, value);
    T lanes[16];
    put(lanes, value);
    for (int i = 0; i < count; ++i) out[i] = lanes[i];
}

// Sums of a few rows and panels: row r of panel p begins at data + r * row + p * panel.
struct Sums {
    float* data;
    int row, panel;

    float* at(int r, int column) const { return data + r * row + column / kPanel * panel + column % kPanel; }
};

// Where the results of some panels go.
struct Output {
    const Weight& w;
    Epilogue epilogue;
    void* out;
    std::int64_t stride;

    bool gated() const { return epilogue == Epilogue::silu_gated || epilogue == Epilogue::gelu_gated; }
    int first_column(int panel) const { return (gated() ? panel / 2 : panel) * kPanel; }
    int columns(int panels) const { return (gated() ? panels / 2 : panels) * kPanel; }

    // Asks for the memory that `finish` will write.
    void expect(int panel, int panels, int row, int count) const {
        const int size = epilogue == Epilogue::f32 ? 4 : 2, bytes = columns(panels) * size;
        const char* at = static_cast<const char*>(out) + (row * stride + first_column(panel)) * size;
        for (int r = 0; r < count; ++r, at += stride * size) {
            for (int i = 0; i < bytes; i += 64) prefetch_to_write(at + i);
        }
    }

    // What came out for `count` rows.
    void finish(int panel, int panels, int row, int count, const Sums& sums) const {
        switch (epilogue) {
            case Epilogue::bf16:
                return each<bf16, 0>(panel, panels, row, count, sums, [](F y, F, F) { return y; });
            case Epilogue::f32:
                return each<float, 0>(panel, panels, row, count, sums, [](F y, F, F) { return y; });
            case Epilogue::add_bf16:
                return each<bf16, 1>(panel, panels, row, count, sums, [](F y, F, F was) { return was + y; });
            case Epilogue::silu_gated:
                return each<bf16, 2>(panel, panels, row, count, sums, [](F y, F up, F) { return silu(y) * up; });
            case Epilogue::gelu_gated:
                return each<bf16, 2>(panel, panels, row, count, sums, [](F y, F up, F) { return gelu(y) * up; });
        }
    }

  private:
    // `operands`: 0 for the result alone, 1 with what is there already, 2 with that of up. Row by row: rows are apart by
    // what maps them to the same lines of the cache.
    template <class T, int operands, class Fn>
    void each(int panel, int panels, int row, int count, const Sums& sums, Fn&& fn) const {
        const int first = first_column(panel), here = (operands == 2 ? w.n / 2 : w.n) - first;
        const int all = columns(panels) < here ? columns(panels) : here;
        const float* bias = w.bias == nullptr ? nullptr : w.bias + panel * kPanel;
        T* to = static_cast<T*>(out) + row * stride + first;
        for (int r = 0; r < count; ++r, to += stride) {
            const auto value = [&](int i) {
                const F y = load(sums.at(r, i));
                return bias == nullptr ? y : y + load(bias + i);
            };
            for (int place = 0; place < all; place += 16) {
                const int from = operands == 2 ? place / kPanel * 2 * kPanel + place % kPanel : place;
                F up = zero(), was = zero();
                if constexpr (operands == 1) was = get_some(to + place, all - place);
                if constexpr (operands == 2) up = value(from + kPanel);
                put_some(to + place, fn(value(from), up, was), all - place);
            }
        }
    }
};

// The rows from `begin` to `end` of some panels, which stay in the cache from one block of rows to the next.
struct Unit {
    const Weight& w;
    const Rows& rows;
    int begin, end;
    int first_panel, panels;
    const Output& output;
    int thread;

    std::int64_t panel_size() const {
        return std::int64_t{w.depth} * (w.format == Format::bf16 ? 64 : w.format == Format::int8 ? 32 : 16);
    }
    const char* panel(int index) const { return static_cast<const char*>(w.data) + index * panel_size(); }

    void unpack_panels(std::uint8_t* out) const {
        for (int one = 0; one < panels; ++one, out += kPanel * w.depth) unpack_panel(w, first_panel + one, out);
    }
    std::size_t unpacked_bytes() const { return std::size_t{kPanel} * w.depth * panels; }

    void by_vectors() const {
        const int steps = w.format == Format::bf16 ? w.depth / 2 : w.depth / 4;
        const int blocks = (end - begin + kRows - 1) / kRows;
        std::uint8_t* as_int8 = nullptr;
        if (w.format == Format::int4 && end - begin > kUnpacking) {
            as_int8 = static_cast<std::uint8_t*>(scratch(thread, unpacked_bytes()));
            unpack_panels(as_int8);
        }
        // One block asks for the panels that it reads; several ask together, evenly, for those of the next unit.
        Ahead ahead{kNear, panel(0), 0};
        if (blocks > 1) ahead = {0, panel(first_panel + panels), panel_size() / (std::int64_t{blocks} * steps)};
        Tile tile;
        for (int block = 0; block < blocks; ++block, ahead.next += ahead.pace * steps * panels) {
            const int row = begin + static_cast<int>(std::int64_t{end - begin} * block / blocks);
            const int count = begin + static_cast<int>(std::int64_t{end - begin} * (block + 1) / blocks) - row;
            Block{w, rows, as_int8, first_panel, panels, row, ahead}.run(count, tile);
            output.finish(first_panel, panels, row, count, {&tile[0][0], kUnit * kPanel, kPanel});
        }
    }

#if defined(__AMX_TILE__)
    // In tiles, `begin` is a multiple of a block's rows.
    void by_tiles(Tiles& tiles) const {
        const std::size_t sums_bytes = sizeof(float) * row_blocks(end - begin) * kBlockRows * panels * kPanel;
        auto* memory = static_cast<char*>(scratch(thread, sums_bytes + unpacked_bytes()));
        auto* sums = reinterpret_cast<float*>(memory);
        const char* data = panel(first_panel);
        std::int64_t size = panel_size();
        if (w.format == Format::int4) {
            unpack_panels(reinterpret_cast<std::uint8_t*>(memory + sums_bytes));
            data = memory + sums_bytes;
            size = std::int64_t{kPanel} * w.depth;
        }
        rows.in_tiles ? many_rows(tiles, data, size, sums) : few_rows(tiles, data, size, sums);
    }

    // Up to a block of rows, where they are.
    void few_rows(Tiles& tiles, const char* data, std::int64_t size, float* sums) const {
        const int count = end - begin;
        const bool wide = count <= kTileRows;
        const int upper = wide ? count : (count + 1) / 2;
        const TileSteps steps(w);
        for (int one = 0; one < panels; one += wide ? 2 : 1) {
            const std::int64_t next = one + 1 < panels ? size : 0, ahead = w.format == Format::int4 ? 0 : kNear;
            TileProduct{wide, data + one * size, next, static_cast<const char*>(rows.data), rows.stride,
                        4 * steps.depth, upper, upper * rows.stride, count, steps, steps.count, false, ahead, nullptr, 0}
                .run(tiles, w.format, sums + one * kPanel, panels * kPanel);
        }
        finish(begin, count, {sums, panels * kPanel, kPanel});
    }

    void many_rows(Tiles& tiles, const char* data, std::int64_t size, float* sums) const {
        const TileSteps steps(w);
        const int all = row_blocks(rows.count), first = begin / kBlockRows, blocks = row_blocks(end - begin);
        constexpr int of_panel = kBlockRows * kPanel;
        // All steps together ask for the panels of the next unit, evenly.
        const std::int64_t pace = panel_size() / (std::int64_t{blocks} * steps.count);
        const char* later = panel(first_panel + panels);
        for (int one = 0; one < panels; ++one) {
            for (int chunk = 0; chunk < steps.chunks(); ++chunk) {
                const char* part = data + one * size + std::int64_t{chunk} * kChunkSteps * steps.depth * 128;
                const int todo = steps.of_chunk(chunk);
                const bool last = one + 1 == panels && chunk + 1 == steps.chunks();
                for (int block = 0; block < blocks; ++block, later += pace * todo) {
                    const int row = begin + block * kBlockRows;
                    if (last && block + 1 < blocks) expect(row + kBlockRows);
                    float* of_block = sums + std::int64_t{block} * panels * of_panel;
                    const char* x = static_cast<const char*>(rows.data) + tiles_at(steps, all, chunk, first + block);
                    TileProduct{false, part, 0, x, kTileBytes, 2 * kTile, kTileRows, kTile, kBlockRows, steps, todo,
                                chunk > 0, 0, later, pace}
                        .run(tiles, w.format, of_block + one * of_panel, kPanel);
                    if (last) finish(row, rows_of(row), {of_block, kPanel, of_panel});
                }
            }
        }
    }

    int rows_of(int row) const { return end - row < kBlockRows ? end - row : kBlockRows; }
    void expect(int row) const { output.expect(first_panel, panels, row, rows_of(row)); }

    void finish(int row, int count, const Sums& sums) const {
        if (w.format != Format::bf16) scale_sums(row, count, sums);
        output.finish(first_panel, panels, row, count, sums);
    }

    // Integer sums become results in their place.
    void scale_sums(int row, int count, const Sums& sums) const {
        for (int r = 0; r < count; ++r) {
            const F of_row = set(rows.scales[row + r]);
            const I surplus = iset(-128 * rows.sums[row + r]);
            for (int i = 0; i < panels * kPanel; i += 16) {
                const F of_output = load(w.scales + first_panel * kPanel + i);
                float* place = sums.at(r, i);
                store(place, to_float(load_bytes(place) + surplus) * of_output * of_row);
            }
        }
    }
#endif
};

// Chunks of rows, for balance and so that those of a chunk stay in the second-level cache.
int chunk_rows([[maybe_unused]] const Weight& w, const Rows& rows, int m) {
#if defined(__AMX_TILE__)
    if (rows.in_tiles) {
        const int fit = static_cast<int>(kNearRows / TileSteps(w).row_bytes()) / kBlockRows;
        const int blocks = row_blocks(m), chunks = (blocks + (fit > 3 ? fit : 4) - 1) / (fit > 3 ? fit : 4);
        return (blocks + chunks - 1) / chunks * kBlockRows;
    }
#endif
    const int fit = static_cast<int>(kNearRows / rows.stride);
    const int most = fit > kLeastRows ? fit : kLeastRows, chunks = (m + most - 1) / most;
    return (m + chunks - 1) / chunks;
}

}  // namespace

void linear(const Weight& w, const Rows& rows, int m, Epilogue epilogue, void* out, std::int64_t out_stride) {
    if (m == 0) return;
    const bool tiled = by_tiles(as_rows_see(w), m);
    const int unit = m <= kThin && !tiled ? kUnit : 2;
    const int units = (w.panels + unit - 1) / unit;
    const int of_chunk = chunk_rows(as_rows_see(w), rows, m), chunks = (m + of_chunk - 1) / of_chunk;
    const int parts = units < kTasks * thread_count() ? units : kTasks * thread_count();
    const Output output{w, epilogue, out, out_stride};
    parallel(parts * chunks, [&](int task, int thread) {
        const int part = task % parts, chunk = task / parts;
        const int begin = chunk * of_chunk, end = m - begin < of_chunk ? m : begin + of_chunk;
        const int last = static_cast<int>(std::int64_t{units} * (part + 1) / parts) * unit;
#if defined(__AMX_TILE__)
        Tiles tiles;
#endif
        for (int panel = static_cast<int>(std::int64_t{units} * part / parts) * unit; panel < last; panel += unit) {
            const int panels = w.panels - panel < unit ? w.panels - panel : unit;
            if (w.bf16_rows) {
                float* sums = Widened{w, rows, begin, end, panel, panels, thread}.sums();
                output.finish(panel, panels, begin, end - begin, {sums, panels * kPanel, kPanel});
                continue;
            }
            const Unit one{w, rows, begin, end, panel, panels, output, thread};
#if defined(__AMX_TILE__)
            if (tiled) {
                one.by_tiles(tiles);
                continue;
            }
#endif
            one.by_vectors();
        }
    });
}

}  // namespace tokenmill::TOKENMILL_ISA
