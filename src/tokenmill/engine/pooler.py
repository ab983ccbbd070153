"""From hidden states to an embedding.

All arithmetic is in float64 and its order is that of the tokens, so that an embedding depends on its prompt alone: not
on how the prompt was cut into chunks, nor on what else was computed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.engine.plan import PoolRow

__all__ = ["pool"]


def pool(hidden: Tensor, row: PoolRow) -> bytes:
    """What the row's tokens bring to an embedding.

    Args:
        hidden: states after the last norm of the row's tokens, [T, hidden_size], any floating type.

    Returns:
        Before the last row of a prompt the sum so far, float64, which only ``mean`` needs; with it the embedding,
        float32.
    """
    params = row.params
    if params.pooling == "last":
        if not row.last:
            return b""
        pooled = _numbers(hidden[-1])
    else:
        total = _total(_numbers(hidden), row.total)
        if not row.last:
            return total.tobytes()
        pooled = total / row.prompt_len
    pooled = pooled[: params.dimensions]
    if params.normalize:
        # An exact sum: that of a library may depend on where the array lies in memory.
        pooled = pooled / (math.sqrt(math.fsum(pooled * pooled)) or 1.0)
    return pooled.astype(np.float32).tobytes()


def _numbers(hidden: Tensor) -> NDArray[np.float64]:
    return hidden.double().cpu().numpy()


def _total(states: NDArray[np.float64], before: bytes) -> NDArray[np.float64]:
    total = np.frombuffer(before, np.float64).copy() if before else np.zeros(states.shape[1])
    for state in states:  # one by one: a library's sum over rows may add them in any order
        total += state
    return total
