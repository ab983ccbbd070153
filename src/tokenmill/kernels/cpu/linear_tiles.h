// Products of panels through the tile unit; see tiles.h. A part of linear.cpp.
//
// Up to 32 rows are read where they are. More are first laid out in tiles, in the order of reading, so that the caches
// bring them in time:
//
//   [chunks of the inputs][blocks of 32 rows][8 steps of the chunk][2][16 rows][64 bytes]
//
// Rows that fill up the last block are whatever is there; what becomes of them is not used.
//
// A chunk of a panel stays in the first-level cache while all blocks of rows pass by, and their sums wait in memory for
// the next chunk. Sums are floats or 32-bit integers, which memory keeps exactly: the order of additions is the same.
#pragma once

#include "linear.h"
#include "tiles.h"
#include "vec.h"

#if defined(__AMX_TILE__)

namespace tokenmill::TOKENMILL_ISA {

constexpr int kBlockRows = 2 * kTileRows;
constexpr int kTile = kTileRows * kTileBytes;  // bytes
constexpr int kChunkSteps = 8;                 // of a chunk: 16 KiB of a panel

// A weight's inputs in steps of the tile unit.
struct TileSteps {
    int depth;   // pairs or quads of inputs in a step: 16 if that makes whole steps
    int count;

    explicit TileSteps(const Weight& w) {
        const int all = w.format == Format::bf16 ? w.depth / 2 : w.depth / 4;
        for (depth = kTileRows; all % depth != 0;) --depth;
        count = all / depth;
    }
    int chunks() const { return (count + kChunkSteps - 1) / kChunkSteps; }
    int of_chunk(int chunk) const {
        const int left = count - chunk * kChunkSteps;
        return left < kChunkSteps ? left : kChunkSteps;
    }
    std::int64_t row_bytes() const { return std::int64_t{count} * kTileBytes; }
};

inline int row_blocks(int m) { return (m + kBlockRows - 1) / kBlockRows; }

// Where the tiles of a chunk and a block begin.
inline std::int64_t tiles_at(TileSteps steps, int blocks, int chunk, int block) {
    const std::int64_t before = std::int64_t{chunk} * kChunkSteps * blocks;
    return (before + std::int64_t{steps.of_chunk(chunk)} * block) * 2 * kTile;
}

// Puts one row of `m`, whole steps of bytes, among the tiles.
inline void put_in_tiles(const char* row, int r, int m, TileSteps steps, char* tiles) {
    const int blocks = row_blocks(m), bytes = 4 * steps.depth;
    for (int chunk = 0; chunk < steps.chunks(); ++chunk) {
        char* to = tiles + tiles_at(steps, blocks, chunk, r / kBlockRows) + r % kBlockRows * kTileBytes;
        for (int step = 0; step < steps.of_chunk(chunk); ++step, row += bytes, to += 2 * kTile) {
            if (bytes == kTileBytes) {
                store_bytes(to, load_bytes(row));
            } else {
                std::memcpy(to, row, bytes);
            }
        }
    }
}

// Up to 32 rows with a panel or, if `wide`, up to 16 with two.
struct TileProduct {
    bool wide;
    const char* panel;       // its steps of 128 bytes, one for each pair or quad
    std::int64_t next;       // bytes to the second panel if wide, or 0 if there is none
    const char* rows;
    std::int64_t stride;     // bytes from row to row,
    std::int64_t advance;    // from step to step,
    int upper;               // and to the first row of the lower half:
    std::int64_t lower;
    int count;               // rows
    TileSteps steps;         // of which
    int todo;                // are done here
    bool goes_on;            // from the sums that are there already
    std::int64_t ahead;      // bytes to ask memory for beyond each that is read of the panels, or 0
    const char* later;       // what to ask for beside that,
    std::int64_t pace;       // so many bytes a step

    // Sums [count][32 or, if wide, 64], `width` of them from row to row.
    void run(Tiles& tiles, Format format, void* sums, int width) const {
        tiles.shape(upper, wide ? upper : count - upper, steps.depth);
        auto* first = static_cast<float*>(sums);
        float* others = wide ? first + 2 * kTileRows : first + std::int64_t{upper} * width;
        const int row = 4 * width;
        if (goes_on) {
            _tile_loadd(0, first, row);
            _tile_loadd(1, first + kTileRows, row);
            _tile_loadd(2, others, row);
            _tile_loadd(3, others + kTileRows, row);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        if (format == Format::bf16) {
            wide ? add<true, true>() : add<true, false>();
        } else {
            wide ? add<false, true>() : add<false, false>();
        }
        _tile_stored(0, first, row);
        _tile_stored(1, first + kTileRows, row);
        if (wide && next == 0) return;
        _tile_stored(2, others, row);
        _tile_stored(3, others + kTileRows, row);
    }

  private:
    template <bool is_bf16, bool is_wide>
    void add() const {
        constexpr int line = 64, pair = 2 * line;  // bytes of a pair or quad for 16 and 32 outputs
        const std::int64_t size = std::int64_t{steps.depth} * pair;
        const char *w = panel, *x = rows, *soon = later;
        for (int step = 0; step < todo; ++step, w += size, x += advance, soon += pace) {
            if (ahead != 0) {
                for (std::int64_t i = 0; i < size; i += line) prefetch(w + ahead + i);
                if (is_wide) {
                    for (std::int64_t i = 0; i < size; i += line) prefetch(w + next + ahead + i);
                }
            }
            for (std::int64_t i = 0; i < pace; i += line) prefetch_far(soon + i);
            _tile_loadd(4, x, stride);
            _tile_loadd(6, w, pair);
            _tile_loadd(7, w + line, pair);
            if constexpr (is_bf16) {
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
            } else {
                _tile_dpbsud(0, 4, 6);
                _tile_dpbsud(1, 4, 7);
            }
            if constexpr (is_wide) {
                _tile_loadd(6, w + next, pair);
                _tile_loadd(7, w + next + line, pair);
                if constexpr (is_bf16) {
                    _tile_dpbf16ps(2, 4, 6);
                    _tile_dpbf16ps(3, 4, 7);
                } else {
                    _tile_dpbsud(2, 4, 6);
                    _tile_dpbsud(3, 4, 7);
                }
            } else {
                _tile_loadd(5, x + lower, stride);
                if constexpr (is_bf16) {
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                } else {
                    _tile_dpbsud(2, 5, 6);
                    _tile_dpbsud(3, 5, 7);
                }
            }
        }
    }
};

}  // namespace tokenmill::TOKENMILL_ISA

#endif
