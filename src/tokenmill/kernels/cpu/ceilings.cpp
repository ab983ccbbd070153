#include "ceilings.h"

#include "threads.h"
#include "tiles.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Somebody might look: what is written here has to be computed.
volatile std::int32_t sink;

void look_at(I sums) {
    std::int32_t lanes[16];
    store(lanes, sums);
    sink = lanes[0];
}

#if defined(__AMX_TILE__)

// Both kinds of tile product take as long: 16 x 16 sums of 64 bytes each.
template <class Products>
void tile_products(int rounds, Products&& products) {
    parallel(thread_count(), [&](int, int) {
        Tiles tiles;
        tiles.shape(kTileRows, kTileRows, kTileRows);
        const char zeros[kTileRows * kTileBytes] = {};
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, zeros, kTileBytes);
        _tile_loadd(5, zeros, kTileBytes);
        _tile_loadd(6, zeros, kTileBytes);
        _tile_loadd(7, zeros, kTileBytes);
        for (int round = 0; round < rounds; ++round) products();
    });
}

std::int64_t operations(int rounds, int of_product) { return std::int64_t{rounds} * thread_count() * 4 * of_product; }

#else

constexpr int kChains = 24;

std::int64_t operations(int rounds, int of_product) {
    return std::int64_t{rounds} * thread_count() * kChains * of_product;
}

#endif

}  // namespace

void read_memory(const void* data, std::size_t bytes) {
    constexpr std::size_t part = 1 << 20, stream = part / 4;
    parallel(static_cast<int>(bytes / part), [&](int task, int) {
        const char* p = static_cast<const char*>(data) + task * part;
        I sums[4] = {izero(), izero(), izero(), izero()};
        for (std::size_t i = 0; i < stream; i += 64) {
            for (int s = 0; s < 4; ++s) sums[s] = sums[s] + load_bytes(p + s * stream + i);
        }
        look_at(sums[0] + sums[1] + sums[2] + sums[3]);
    });
}

std::int64_t peak_bf16(int rounds) {
#if defined(__AMX_TILE__)
    tile_products(rounds, [] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    });
    return operations(rounds, 2 * 16 * 16 * 32);
#else
    parallel(thread_count(), [&](int, int) {
        F sums[kChains];
        for (F& one : sums) one = zero();
        bf16 ones[32];
        for (bf16& one : ones) one = 0x3f80;
        const I w = load_bytes(ones);
        for (int round = 0; round < rounds; ++round) {
            const auto x = static_cast<std::uint32_t>(round);
#pragma GCC unroll 24
            for (F& one : sums) one = dot_bf16(one, w, x);
        }
        F all = zero();
        for (const F& one : sums) all = all + one;
        look_at(to_int(all));
    });
    return operations(rounds, 2 * 16 * 2);
#endif
}

std::int64_t peak_int8(int rounds) {
#if defined(__AMX_TILE__)
    tile_products(rounds, [] {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    });
    return operations(rounds, 2 * 16 * 16 * 64);
#else
    parallel(thread_count(), [&](int, int) {
        I sums[kChains];
        for (I& one : sums) one = izero();
        const I w = iset(0x01020304);
        for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
            for (I& one : sums) one = dot_u8s8(one, w, round);
        }
        I all = izero();
        for (const I& one : sums) all = all + one;
        look_at(all);
    });
    return operations(rounds, 2 * 16 * 4);
#endif
}

}  // namespace tokenmill::TOKENMILL_ISA
