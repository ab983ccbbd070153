"""8 bits: one scale per output.

8 bits per weight and one scale of 32 per row. Rounding errors are so much smaller than the weights that nothing but
the largest weight of a row decides its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.quant.weight import LIMIT, Quantized

__all__ = ["FORMAT", "Int8"]


class Int8:
    """Symmetric, per output."""

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Quantized:
        """[N, K] float32 to the nearest whole numbers; the largest weight of a row becomes 127."""
        scales = weight.abs().amax(dim=1) / LIMIT
        inverse = torch.where(scales > 0, 1 / scales, 0)
        return Quantized((weight * inverse.unsqueeze(1)).round_().char(), scales, weight.shape[1])


FORMAT = Int8()
