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

_RANGES = (1.0, 0.92, 0.84)
"""Shares of a group's range that are tried. The levels are fitted after each, so that a coarse choice is enough."""

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
            scales, multipliers, offsets = grid(*self._search(chunk, importance), self.symmetric)
            parts.append(_on_grid(chunk, importance, scales, multipliers, offsets, inputs))
        return Quantized.cat(parts)

    def _search(self, w: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """The best levels ``low + q * step`` of groups w [N, groups, group]: low and step, both [N, groups] float32."""
        weighted, total = w * importance, importance.sum(-1)
        best = torch.full(w.shape[:2], -1.0, device=w.device)
        lows, steps = torch.zeros_like(best), torch.zeros_like(best)
        for low, step in self._candidates(w):
            inverse = torch.where(step > 0, 1 / step, 0)
            q = (w * inverse.unsqueeze(-1)).sub_((low * inverse).unsqueeze(-1)).round_().clamp_(0, 15)
            # Linear regression of w on q gives the best levels for these q, and by how much they lower the error.
            if self.symmetric:
                q -= 8
                along, length = (weighted * q).sum(-1), q.square_().mul_(importance).sum(-1)
                step = torch.where(length > 0, along / length, 0)
                low, gain = -8 * step, along * step
            else:
                mean = weighted.sum(-1) / total
                middle = (q * importance).sum(-1) / total
                along = (weighted * q).sum(-1) - total * mean * middle
                length = q.square_().mul_(importance).sum(-1) - total * middle.square()
                step = torch.where(length > 1e-4 * total, along / length, step)  # else all q are one
                low, gain = mean - middle * step, along * step + total * mean.square()
            better = gain > best
            best = torch.where(better, gain, best)
            lows, steps = torch.where(better, low, lows), torch.where(better, step, steps)
        return lows, steps

    def _candidates(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Lows and steps to try, both [N, groups] float32."""
        low, high = w.amin(-1).clamp_(max=0), w.amax(-1).clamp_(min=0)  # offsets are not negative
        for share in _RANGES:
            if self.symmetric:
                step = torch.maximum(-low / 8, high / 7) * share
                yield -8 * step, step
            else:
                lost = (high - low) * ((1 - share) / 2)
                yield low + lost, (high - low) * (share / 15)


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


def _on_grid(
    w: Tensor, importance: Tensor, scales: Tensor, multipliers: Tensor, offsets: Tensor | None, inputs: int
) -> Quantized:
    """Rounds groups w [N, groups, group] to their levels, then fits the scale of each row to the outcome."""
    target = w * torch.where(scales > 0, 1 / scales, 0).view(-1, 1, 1)
    lowest = whole_numbers(torch.zeros_like(multipliers).unsqueeze(-1), multipliers, offsets)
    inverse = torch.where(multipliers > 0, 16 / multipliers, 0).unsqueeze(-1)
    below = (target - lowest).mul_(inverse).add_(_FLOOR * inverse).floor_().clamp_(0, 15).byte()
    above = (below + 1).clamp_(max=15)
    errors = [(target - whole_numbers(q, multipliers, offsets)).abs_() for q in (below, above)]
    digits = torch.where(errors[1] < errors[0], above, below)
    whole = whole_numbers(digits, multipliers, offsets).float()
    weighted = whole * importance
    along, length = (weighted * w).sum((1, 2)), (weighted * whole).sum((1, 2))
    scales = torch.where(length > 0, along / length, scales)
    return Quantized(pack(digits.flatten(1)), scales, inputs, w.shape[2], multipliers, offsets)


def pack(digits: Tensor) -> Tensor:
    """[N, K] uint8 of 0..15 to [N, K/2] uint8, the even column in the low half."""
    return digits[:, ::2] | digits[:, 1::2] << 4


FORMAT = Int4()
