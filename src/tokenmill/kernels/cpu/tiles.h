// The tile unit of AMX (Intel Architecture Instruction Set Extensions, chapter 3): eight registers of up to 16 rows of
// 64 bytes, and the product of two of them:
//
//   bf16   sum[r][n] += a[r][k] * b[k][n]   a: rows of 32 bf16, b: rows of 16 pairs (k, k + 1)
//   int8   sum[r][n] += a[r][k] * b[k][n]   a: rows of 64 int8, b: rows of 16 quads (k .. k + 3) of uint8
//
// So b is what the panels of linear.h and the blocks of attention.h hold, and a is plain rows. A row of sums depends on
// that row of `a` and on b alone, and products are added in the order of k. In bf16 subnormal numbers count as zeros.
//
// Registers have fixed parts here: sums are 0 to 3, a is 4 and 5, b is 6 and 7.
#pragma once

#if defined(__AMX_TILE__)

#include <immintrin.h>

#include <cstdint>

namespace tokenmill::TOKENMILL_ISA {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row

// Holds the tile registers of this thread, and gives them back: a thread that keeps them is slower to switch.
class Tiles {
  public:
    Tiles() = default;
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // Sums 0 and 1, and register 4 of a, have `upper` rows; sums 2 and 3, and register 5, have `lower`. Rows of a are
    // 4 * `depth` bytes long and b has `depth` rows. Forgets what the registers hold if that is a change. To be called
    // between writing memory and loading tiles from it, of which compilers do not know that it reads memory.
    void shape(int upper, int lower, int depth) {
        asm volatile("" ::: "memory");
        if (upper == upper_ && lower == lower_ && depth == depth_) return;
        upper_ = upper;
        lower_ = lower;
        depth_ = depth;
        alignas(64) struct {
            std::uint8_t palette = 1, start = 0, reserved[14] = {};
            std::uint16_t bytes[16] = {};
            std::uint8_t rows[16] = {};
        } config;
        for (int sum = 0; sum < 4; ++sum) {
            config.bytes[sum] = kTileBytes;
            config.rows[sum] = static_cast<std::uint8_t>(sum < 2 ? upper : lower);
        }
        config.bytes[4] = config.bytes[5] = static_cast<std::uint16_t>(4 * depth);
        config.rows[4] = static_cast<std::uint8_t>(upper);
        config.rows[5] = static_cast<std::uint8_t>(lower);
        config.bytes[6] = config.bytes[7] = kTileBytes;
        config.rows[6] = config.rows[7] = static_cast<std::uint8_t>(depth);
        asm volatile("" ::: "memory");
        _tile_loadconfig(&config);
    }

  private:
    int upper_ = 0, lower_ = 0, depth_ = 0;
};

}  // namespace tokenmill::TOKENMILL_ISA

#endif
