"""Rotary position embedding (RoPE, arXiv 2104.09864) as a description: which dimensions turn how fast. No torch.

Pair i of R rotated dimensions turns by ``position * theta ** (-2i / R)``. A scaling changes these frequencies so that
a model reaches further than it was trained for; each kind of scaling is one class here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["Linear", "Llama3", "LongRope", "RopeScaling", "RopeSpec", "Unscaled", "Yarn"]

Frequencies = tuple[float, ...]
"""Radians per position of each rotated pair of dimensions."""


@dataclass(frozen=True)
class Unscaled:
    """The frequencies as trained."""

    attention_factor: ClassVar[float] = 1.0

    def apply(self, base: Frequencies, rope: RopeSpec, longest: int) -> Frequencies:
        return base


@dataclass(frozen=True)
class Linear:
    """Position interpolation (arXiv 2306.15595): every position is divided by `factor`."""

    factor: float
    attention_factor: ClassVar[float] = 1.0

    def apply(self, base: Frequencies, rope: RopeSpec, longest: int) -> Frequencies:
        return tuple(f / self.factor for f in base)


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: long waves are divided by `factor`, short waves stay, those between are blended.

    A wave is long when it turns fewer than `low_freq_factor` times within the context that the model was first trained
    on, and short when it turns more than `high_freq_factor` times. (Llama 3 report, arXiv 2407.21783, and its code.)
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int
    attention_factor: ClassVar[float] = 1.0

    def apply(self, base: Frequencies, rope: RopeSpec, longest: int) -> Frequencies:
        return tuple(self._scaled(f) for f in base)

    def _scaled(self, frequency: float) -> float:
        turns = self.original_max_position * frequency / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = min(max(keep, 0.0), 1.0)
        return frequency * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): interpolates long waves, keeps short ones, and sharpens the attention.

    `beta_fast` and `beta_slow` are the turns within the original context above which a wave is kept and below which it
    is interpolated; the ramp between is linear in the dimension, with its ends on whole dimensions if `truncate`.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def apply(self, base: Frequencies, rope: RopeSpec, longest: int) -> Frequencies:
        def dimension(turns: float) -> float:
            waves = self.original_max_position / (turns * 2 * math.pi)
            return rope.dim * math.log(waves) / (2 * math.log(rope.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dim - 1)
        width = high - low or 0.001  # the ramp is a step when both ends fall on one dimension
        ramp = (min(max((i - low) / width, 0.0), 1.0) for i in range(len(base)))
        return tuple(f * (1 - r) + f / self.factor * r for f, r in zip(base, ramp, strict=True))


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): one divisor per frequency, from a short or a long list.

    The list is chosen once, by the longest sequence that is going to be computed, and not per batch: keys already in
    the cache were rotated with one list, and an answer must not depend on who else is in the batch.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    attention_factor: float

    def apply(self, base: Frequencies, rope: RopeSpec, longest: int) -> Frequencies:
        factors = self.long_factor if longest > self.original_max_position else self.short_factor
        return tuple(f / divisor for f, divisor in zip(base, factors, strict=True))


RopeScaling = Unscaled | Linear | Llama3 | Yarn | LongRope


@dataclass(frozen=True)
class RopeSpec:
    """Which dimensions of a head turn with the position, and how fast."""

    theta: float
    dim: int
    """R, the number of rotated dimensions; the first R of a head."""
    scaling: RopeScaling = Unscaled()

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin, and so the attention scores by its square."""
        return self.scaling.attention_factor

    def frequencies(self, longest: int) -> Frequencies:
        """Radians per position, R/2 of them, when sequences are at most `longest` tokens."""
        base = tuple(self.theta ** (-2 * i / self.dim) for i in range(self.dim // 2))
        return self.scaling.apply(base, self, longest)
