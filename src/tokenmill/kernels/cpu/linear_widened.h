// Products of weights of whole numbers with rows of bf16. A part of linear.cpp.
//
// bf16 holds every whole number of an int8 or int4 weight. A chunk of the inputs of some panels is written as panels of
// bf16, small enough for the first-level cache, meets all rows, and makes room for the next; sums wait in memory, which
// keeps floats exactly. So an output is one chain of dot products over K, as it is for bf16 weights, and is scaled once
// at its end.
#pragma once

#include "linear.h"
#include "linear_int4.h"
#include "linear_rows.h"
#include "linear_tiles.h"
#include "threads.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {

// Four whole numbers w + 128 in each lane as two pairs of bf16; from pair to pair it is a panel's width.
inline void widen(I quads, bf16* out) {
    const auto number = [](I bytes) { return bits(to_float((bytes & iset(0xff)) - iset(128))); };  // 16 bits are enough
    const auto pair = [&](I first, I second) { return shift_right<16>(number(first)) | number(second); };
    store_bytes(out, pair(quads, shift_right<8>(quads)));
    store_bytes(out + 2 * kPanel, pair(shift_right<16>(quads), shift_right<24>(quads)));
}

// The rows from `begin` to `end` of some panels.
struct Widened {
    const Weight& w;
    const Rows& rows;
    int begin, end;
    int first_panel, panels;
    int thread;

    // [end - begin][panels * 32] in the thread's scratch memory.
    float* sums() const {
#if defined(__AMX_TILE__)
        float* sums = by_tiles();
#else
        float* sums = by_vectors();
#endif
        for (int r = 0; r < end - begin; ++r) {
            for (int i = 0; i < width(); i += 16) {
                float* place = sums + r * width() + i;
                store(place, load(place) * load(w.scales + first_panel * kPanel + i));
            }
        }
        return sums;
    }

  private:
    static constexpr int kPairs = 64;   // of inputs in a chunk, whole groups of int4: 8 KiB of a panel
    static constexpr int kAhead = 4096;  // bytes to ask memory for ahead of time

    int width() const { return panels * kPanel; }

    // Pairs of inputs from `first` on of all panels, [panels][pairs][32][2].
    void widen_panels(int first, int pairs, bf16* out) const {
        for (int panel = first_panel; panel < first_panel + panels; ++panel, out += pairs * 2 * kPanel) {
            w.format == Format::int8 ? widen_int8(panel, first, pairs, out) : widen_int4(panel, first, pairs, out);
        }
    }

    void widen_int8(int panel, int first, int pairs, bf16* out) const {
        const std::int64_t start = std::int64_t{panel} * w.depth + 2 * first;
        const auto* data = static_cast<const std::uint8_t*>(w.data) + start * kPanel;
        for (int pair = 0; pair < pairs; pair += 2, data += 4 * kPanel, out += 4 * kPanel) {
            for (int v = 0; v < 2; ++v) {
                prefetch(data + 64 * v + kAhead);
                widen(load_bytes(data + 64 * v), out + 32 * v);
            }
        }
    }

    void widen_int4(int panel, int first, int pairs, bf16* out) const {
        const std::int64_t start = std::int64_t{panel} * w.depth + 2 * first;
        const auto* data = static_cast<const std::uint8_t*>(w.data) + start * (kPanel / 2);
        for (int input = 0; input < 2 * pairs; input += w.group) {
            const std::int64_t place = (start + input) / w.group * kPanel;
            const Group groups[2] = {load_group(w, place), load_group(w, place + 16)};
            for (int step = 0; step < w.group; step += 8, data += 4 * kPanel, out += 8 * kPanel) {
                for (int v = 0; v < 2; ++v) {
                    prefetch(data + 64 * v + kAhead);
                    I low, high;
                    unpack(load_bytes(data + 64 * v), groups[v], low, high);
                    widen(low, out + 32 * v);
                    widen(high, out + 4 * kPanel + 32 * v);
                }
            }
        }
    }

#if defined(__AMX_TILE__)
    float* by_tiles() const {
        const TileSteps steps(as_rows_see(w));
        const int blocks = row_blocks(end - begin), all = row_blocks(rows.count), first = begin / kBlockRows;
        const std::int64_t size = std::int64_t{kChunkSteps} * steps.depth * 2 * kPanel;  // of a panel's chunk, at most
        const std::size_t of_sums = std::size_t(blocks) * kBlockRows * width() + 2 * kPanel;
        auto* sums = static_cast<float*>(scratch(thread, sizeof(float) * of_sums + sizeof(bf16) * size * panels));
        auto* chunk_data = reinterpret_cast<bf16*>(sums + of_sums);
        Tiles tiles;
        for (int chunk = 0; chunk < steps.chunks(); ++chunk) {
            const int todo = steps.of_chunk(chunk), pairs = todo * steps.depth;
            widen_panels(chunk * kChunkSteps * steps.depth, pairs, chunk_data);
            const auto* data = reinterpret_cast<const char*>(chunk_data);
            const std::int64_t of_panel = std::int64_t{pairs} * 4 * kPanel;  // bytes
            const auto* x = static_cast<const char*>(rows.data);
            for (int block = 0; rows.in_tiles && block < blocks; ++block) {
                const char* of_block = x + tiles_at(steps, all, chunk, first + block);
                for (int one = 0; one < panels; ++one) {
                    TileProduct{false, data + one * of_panel, 0, of_block, kTileBytes, 2 * kTile, kTileRows, kTile,
                                kBlockRows, steps, todo, chunk > 0, 0, nullptr, 0}
                        .run(tiles, Format::bf16, sums + block * kBlockRows * width() + one * kPanel, width());
                }
            }
            if (rows.in_tiles) continue;
            // Up to a block of rows, where they are.
            const int count = end - begin;
            const bool wide = count <= kTileRows;
            const int upper = wide ? count : (count + 1) / 2;
            const char* of_chunk = x + begin * rows.stride + std::int64_t{chunk} * kChunkSteps * 4 * steps.depth;
            for (int one = 0; one < panels; one += wide ? 2 : 1) {
                const std::int64_t next = one + 1 < panels ? of_panel : 0;
                TileProduct{wide, data + one * of_panel, next, of_chunk, rows.stride, 4 * steps.depth, upper,
                            upper * rows.stride, count, steps, todo, chunk > 0, 0, nullptr, 0}
                    .run(tiles, Format::bf16, sums + one * kPanel, width());
            }
        }
        return sums;
    }
#else
#if defined(__AVX512F__)
    static constexpr int kManyRows = 6;  // at once, with two panels
    static constexpr int kFewRows = 3;   // with four
#else
    static constexpr int kManyRows = 2, kFewRows = 0;
#endif

    float* by_vectors() const {
        const int count = end - begin, blocks = (count + kManyRows - 1) / kManyRows, all = w.depth / 2;
        const std::size_t of_sums = std::size_t(count) * width(), of_chunk = std::size_t{kPairs} * 2 * width();
        auto* sums = static_cast<float*>(scratch(thread, sizeof(float) * of_sums + sizeof(bf16) * of_chunk));
        auto* chunk = reinterpret_cast<bf16*>(sums + of_sums);
        std::memset(sums, 0, sizeof(float) * of_sums);
        for (int first = 0; first < all; first += kPairs) {
            const int pairs = all - first < kPairs ? all - first : kPairs;
            widen_panels(first, pairs, chunk);
            for (int block = 0; block < blocks; ++block) {
                const int row = count * block / blocks, last = count * (block + 1) / blocks;
                const auto* x = static_cast<const char*>(rows.data) + (begin + row) * rows.stride + 4 * first;
                some_rows(last - row, chunk, pairs, x, sums + row * width());
            }
        }
        return sums;
    }

    // The right number of rows and panels, known to the compiler.
    template <int R = kManyRows>
    void some_rows(int count, const bf16* chunk, int pairs, const char* x, float* sums) const {
        if constexpr (R > 1) {
            if (count < R) return some_rows<R - 1>(count, chunk, pairs, x, sums);
        }
        int panel = 0;
        const auto add = [&]<int P>() {
            for (; panel + P <= panels; panel += P) {
                add_products<R, P>(chunk + std::int64_t{panel} * pairs * 2 * kPanel, pairs, x, sums + panel * kPanel);
            }
        };
        if constexpr (R <= kFewRows) add.template operator()<4>();
        add.template operator()<2>();
        add.template operator()<1>();
    }

    template <int R, int P>
    void add_products(const bf16* data, int pairs, const char* x, float* sums) const {
        F sum[R][2 * P];
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < 2 * P; ++v) sum[r][v] = load(sums + r * width() + 16 * v);
        }
        for (int pair = 0; pair < pairs; ++pair, data += 2 * kPanel, x += 4) {
            I vectors[2 * P];
            for (int v = 0; v < 2 * P; ++v) vectors[v] = load_bytes(data + v / 2 * pairs * 2 * kPanel + v % 2 * 32);
            for (int r = 0; r < R; ++r) {
                std::uint32_t both;
                std::memcpy(&both, x + r * rows.stride, sizeof(both));
                for (int v = 0; v < 2 * P; ++v) sum[r][v] = dot_bf16(sum[r][v], vectors[v], both);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < 2 * P; ++v) store(sums + r * width() + 16 * v, sum[r][v]);
        }
    }
#endif
};

}  // namespace tokenmill::TOKENMILL_ISA
