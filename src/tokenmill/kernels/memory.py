"""Memory for what is large and kept: the KV cache and packed weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["zeros"]

_LINE = 64


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take no memory before they are written.

    numpy asks the system for zeroed pages, and for huge ones, which are read about a tenth faster. What it gives begins
    anywhere; here it begins with a cache line, so that no vector is read from two of them.
    """
    count = math.prod(shape) * dtype.itemsize
    memory = np.zeros(count + _LINE, np.uint8)
    begin = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory[begin : begin + count]).view(dtype).view(shape)
