"""4 bits: groups of inputs share a multiplier, and the multipliers of a row share a scale.

A weight is stored as q in 0..15, a group as an 8-bit multiplier m and an 8-bit offset b, a row as a float32 scale:

    w8 = floor(q * m / 16) - b,  weight = scale * w8

So a row is a row of whole numbers once it is unpacked, and products run in 8-bit arithmetic. The rounding of w8 costs
little: a step between two q is about 16 whole numbers where the weights of a row are largest. A symmetric group has the
offset ``floor(m / 2)``, which makes q = 8 a zero, and does not store it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.quant.weight import LIMIT, Quantized, whole_numbers

__all__ = ["FORMAT", "Int4", "grid", "pack"]

_CHUNK = 2**18
"""Weights handled at once: few enough for the temporaries to stay in the cache."""

_SHARES = (0.96, 0.9, 0.83)
"""Shares of a group's range that the levels may span at first. They are fitted then, so a coarse choice is enough."""

_PLACES = (0.0, 0.5, 1.0)
"""Of the part that they do not span, how much lies below them."""

_FITS = 2
"""Rounds of assigning weights to levels and fitting the levels to them, after the first, for the best."""

_FLOOR = 0.47
"""What ``floor(q * m / 16)`` lies below ``q * m / 16`` on average."""


@dataclasses.dataclass(frozen=True)
class Int4:
    """Rounding with a search of the range that weighs the errors of a group least."""

    group: int = 32
    """32, 64 or 128 inputs."""
    symmetric: bool = False
    """Whether groups do without offsets, for 8 bits less per group."""

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Quantized:
        """[N, K] float32 to the levels with the least weighted squared error that was found."""
        inputs = weight.shape[1]
        filled = -inputs % self.group
        if importance is None:
            importance = torch.ones(inputs, device=weight.device)
        importance = F.pad(importance, (0, filled)).view(1, -1, self.group)
        step = max(1, _CHUNK // max(1, inputs))
        parts = []
        for start in range(0, max(1, weight.shape[0]), step):
            chunk = F.pad(weight[start : start + step], (0, filled)).view(-1, importance.shape[1], self.group)
            stored = _stored(chunk, importance, *self._search(chunk, importance), self.symmetric)
            scales, multipliers, offsets, digits = stored
            scales = _fitted(chunk, importance, *stored)
            parts.append(Quantized(pack(digits.flatten(1)), scales, inputs, self.group, multipliers, offsets))
        return Quantized.cat(parts)

    def _search(self, w: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """The best levels ``low + q * step`` of groups w [N, groups, group]: low and step, both [N, groups] float32."""
        best = torch.full(w.shape[:2], -1.0, device=w.device)
        lows, steps = torch.zeros_like(best), torch.zeros_like(best)
        for low, step in self._candidates(w):
            low, step, gain = self._fit(w, importance, low, step)
            better = gain > best
            best = torch.where(better, gain, best)
            lows, steps = torch.where(better, low, lows), torch.where(better, step, steps)
        for _ in range(_FITS):
            lows, steps, _ = self._fit(w, importance, lows, steps)
        return lows, steps

    def _fit(self, w: Tensor, importance: Tensor, low: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels that are best for the q that weights have at the levels given, and by how much they lower the error.

        Linear regression of w on q: the next round of Lloyd's method (IEEE Trans. Inf. Theory 28, 1982, page 129) for
        levels that are equally far apart.
        """
        total, weighted = importance.sum(-1), (w * importance).sum(-1)
        inverse = torch.where(step > 0, 1 / step, 0)
        q = (w * inverse.unsqueeze(-1)).sub_((low * inverse).unsqueeze(-1)).round_().clamp_(0, 15)
        counted = q * importance
        q1, q2, along = counted.sum(-1), (counted * q).sum(-1), (counted * w).sum(-1)
        if self.symmetric:  # of w on q - 8, through zero
            along, length = along - 8 * weighted, q2 - 16 * q1 + 64 * total
            step = torch.where(length > 0, along / length, 0).clamp_(min=0)
            return -8 * step, step, along * step
        inverse = torch.where(total > 0, 1 / total, 0)
        mean, middle = weighted * inverse, q1 * inverse
        along, length = along - mean * q1, q2 - middle * q1
        step = torch.where(length > 1e-4 * total, along / length, step)  # else all q are one
        return mean - middle * step, step, along * step + mean * weighted

    def _candidates(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Lows and steps to begin with, both [N, groups] float32."""
        low, high = w.amin(-1).clamp_(max=0), w.amax(-1).clamp_(min=0)  # offsets are not negative
        for share in _SHARES:
            if self.symmetric:
                step = torch.maximum(-low / 8, high / 7) * share
                yield -8 * step, step
                continue
            for place in _PLACES:
                yield low + (high - low) * ((1 - share) * place), (high - low) * (share / 15)


def grid(lows: Tensor, steps: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The storable levels nearest to ``lows + q * steps`` such that no whole number exceeds 127.

    Args:
        lows: [N, groups] float32; zero is meant to lie within the levels.
        steps: [N, groups] float32, not negative.

    Returns:
        Scales [N] float32, multipliers [N, groups] uint8, offsets [N, groups] uint8 or None if symmetric.
    """
    most = torch.maximum(-lows, lows + 15 * steps) / LIMIT
    rows = torch.maximum(most, steps * (16 / 255)).amax(dim=1)
    inverse = torch.where(rows > 0, 1 / rows, 0).unsqueeze(1)
    multipliers = (16 * steps * inverse).round_().clamp_(0, 255)
    if symmetric:
        return rows, multipliers.byte(), None
    offsets = (-lows * inverse).sub_(_FLOOR).round_()
    least = (15 * multipliers).div(16, rounding_mode="floor").sub_(LIMIT).clamp_(min=0)
    return rows, multipliers.byte(), offsets.clamp_(max=LIMIT).maximum(least).byte()


def _stored(
    w: Tensor, importance: Tensor, lows: Tensor, steps: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The levels of groups w [N, groups, group] as they are stored: `grid`, but of the multipliers next to each step
    the one with the least error, since each rounds its levels in its own way.

    Returns:
        As `grid`, and the 4-bit numbers [N, groups, group] uint8.
    """
    rows, nearest, _ = grid(lows, steps, symmetric)
    inverse = torch.where(rows > 0, 1 / rows, 0)
    target = w * inverse.view(-1, 1, 1)
    middle = (lows + 7.5 * steps) * inverse.unsqueeze(1)
    best = torch.full(steps.shape, torch.inf, device=w.device)
    multipliers, offsets = nearest, nearest
    digits = torch.zeros_like(w, dtype=torch.uint8)
    for change in (0, -1, 1):
        m = (nearest.int() + change).clamp_(0, 255)
        b = m >> 1
        if not symmetric:
            b = (m * (7.5 / 16) - middle - _FLOOR).round_().clamp_(0, LIMIT).int()
            b = torch.maximum(b, (15 * m >> 4) - LIMIT)
        m, b = m.byte(), b.byte()
        q, level = _nearest(target, m, b)
        error = ((target - level).square_().mul_(importance)).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        multipliers, offsets = torch.where(better, m, multipliers), torch.where(better, b, offsets)
        digits = torch.where(better.unsqueeze(-1), q, digits)
    return rows, multipliers, None if symmetric else offsets, digits


def _nearest(target: Tensor, multipliers: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The q of the level nearest to each of target [N, groups, group], uint8, and that level, int8."""
    inverse = torch.where(multipliers > 0, 16 / multipliers, 0).unsqueeze(-1)
    below = (target + offsets.unsqueeze(-1)).add_(_FLOOR).mul_(inverse).floor_().clamp_(0, 15).byte()
    above = (below + 1).clamp_(max=15)
    low, high = (whole_numbers(q, multipliers, offsets) for q in (below, above))
    closer = (target - high).abs_() < (target - low).abs_()
    return torch.where(closer, above, below), torch.where(closer, high, low)


def _fitted(
    w: Tensor, importance: Tensor, scales: Tensor, multipliers: Tensor, offsets: Tensor | None, digits: Tensor
) -> Tensor:
    """The scales of the rows that fit their whole numbers best."""
    whole = whole_numbers(digits, multipliers, offsets).float()
    weighted = whole * importance
    along, length = (weighted * w).sum((1, 2)), (weighted * whole).sum((1, 2))
    return torch.where(length > 0, along / length, scales)


def pack(digits: Tensor) -> Tensor:
    """[N, K] uint8 of 0..15 to [N, K/2] uint8, the even column in the low half."""
    return digits[:, ::2] | digits[:, 1::2] << 4


FORMAT = Int4()
