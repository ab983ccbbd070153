// From four bits to eight: int4 weights as the bytes w + 128 that int8 weights are. Shared by parts of linear.cpp.
#pragma once

#include "linear.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {

// What turns the four-bit q of one group and 16 outputs into w + 128: multipliers in all 16-bit lanes, as they are and
// times 16, and 128 - b in all bytes.
struct Group {
    I multiplier, multiplier16, shift;
};

inline Group load_group(const Weight& w, std::int64_t place) {
    const I m = widen_bytes(w.multipliers + place);
    const I b = w.offsets != nullptr ? widen_bytes(w.offsets + place) : shift_right<1>(m);
    const I shift = iset(128) - b;
    const I pairs = m | shift_left<16>(m);
    const I twice = shift | shift_left<8>(shift);
    return {pairs, shift_left<4>(pairs), twice | shift_left<16>(twice)};
}

// Four nibbles n3 n2 n1 n0 lie in each 16 bits: n2 and n0 are the even and the odd byte of the first quad, n3 and n1
// those of the second. The multiplication itself moves a product to the place of its byte: the high half of (n2 << 8) *
// (m << 4) and of (n3 << 12) * m is the even byte, bits 8 to 15 of n0 * (m << 4) and of (n1 << 4) * m are the odd one.
inline void unpack(I nibbles, const Group& g, I& first, I& second) {
    const I odd = iset(static_cast<std::int32_t>(0xff00ff00u));
    const I n0 = nibbles & iset(0x000f000f), n1 = nibbles & iset(0x00f000f0);
    const I n2 = nibbles & iset(0x0f000f00), n3 = nibbles & iset(static_cast<std::int32_t>(0xf000f000u));
    first = add_bytes(multiply_high16(n2, g.multiplier16) | (multiply_low16(n0, g.multiplier16) & odd), g.shift);
    second = add_bytes(multiply_high16(n3, g.multiplier) | (multiply_low16(n1, g.multiplier) & odd), g.shift);
}

}  // namespace tokenmill::TOKENMILL_ISA
