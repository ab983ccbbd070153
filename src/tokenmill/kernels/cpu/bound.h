// How numbers become whole ones: as so many steps, the largest magnitude as the most of them.
#pragma once

#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {

// The largest magnitude of some numbers, and whether all are finite.
class Bound {
  public:
    void add(F x) {
        most_ = max(most_, abs(x));
        broken_ = fma(x, zero(), broken_);  // 0 * NaN and 0 * infinity are NaN
    }

    // The size of a step if `count` of them reach the bound: NaN if a number is not finite, 0 if none is as large as
    // 1e-30. Those count as zeros, so that steps and their inverses lose no bits.
    float step(int count) const {
        const float bound = largest(most_), broken = sum(broken_);
        return broken == 0 && bound >= 1e-30f ? bound / static_cast<float>(count) : broken;
    }

  private:
    F most_ = zero(), broken_ = zero();
};

}  // namespace tokenmill::TOKENMILL_ISA
