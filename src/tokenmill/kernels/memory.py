"""Memory for what is large and kept: the KV cache and packed weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["zeros"]


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take no memory before they are written.

    numpy asks the system for zeroed pages, and for huge ones, which are read about a tenth faster.
    """
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
