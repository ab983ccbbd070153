// How rows reach a weight. Shared by linear.cpp and prepare.cpp.
#pragma once

#include "linear.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int kPanel = 32;  // outputs that lie together

// The weight that rows are made ready for: one of bf16 if they stay that.
inline Weight as_rows_see(Weight w) {
    if (w.bf16_rows) w.format = Format::bf16;
    return w;
}

// The first `count` of 16 lanes, and zeros.
inline F get_some(const bf16* in, int count) {
    if (count >= 16) return load(in);
    bf16 lanes[16] = {};
    for (int i = 0; i < count; ++i) lanes[i] = in[i];
    return load(lanes);
}

// Whether m rows go through the tile unit: sums of bf16 come out the same only from one kind of kernel, those of integers
// from any.
inline bool by_tiles([[maybe_unused]] const Weight& w, [[maybe_unused]] int m) {
#if defined(__AMX_TILE__)
    constexpr int by_vectors = 4;  // rows up to which those are as fast
    return w.format == Format::bf16 || m > by_vectors;
#else
    return false;
#endif
}

// Whether they are laid out in tiles before.
inline bool in_tiles([[maybe_unused]] const Weight& w, [[maybe_unused]] int m) {
#if defined(__AMX_TILE__)
    return by_tiles(w, m) && m > 32;
#else
    return false;
#endif
}

}  // namespace tokenmill::TOKENMILL_ISA
