"""Which cached block goes first when memory is needed.

An eviction policy is one function that returns a sort key for a cached block; the lowest key is evicted first, and of
equal keys the deepest block of a prompt, since a block is useless without the blocks before it.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable

__all__ = ["EVICTION", "CachedBlock", "EvictableBlocks"]


@dataclasses.dataclass(slots=True)
class CachedBlock:
    """What is known about the content of a block."""

    digest: bytes
    group: int
    depth: int
    """Index of the block in its sequence."""
    last_used: float
    uses: int = 1
    """Requests that wrote or hit it."""


Key = Callable[[CachedBlock, float], float]


def lru(block: CachedBlock, floor: float) -> float:  # noqa: ARG001
    """Least recently used first."""
    return block.last_used


def lfu(block: CachedBlock, floor: float) -> float:  # noqa: ARG001
    """Least often used first."""
    return float(block.uses)


def cost(block: CachedBlock, floor: float) -> float:
    """Cheapest to lose first: uses times the work to recompute, GreedyDual-Size-Frequency (Cherkasova 1998).

    The work grows with depth because of attention over all earlier tokens; the constant makes it double about every 128
    blocks. `floor`, the key of the last evicted block, ages what has not been used since.
    """
    return floor + block.uses * (1 + block.depth / 128)


EVICTION: dict[str, Key] = {"lru": lru, "lfu": lfu, "cost": cost}


class EvictableBlocks:
    """The cached blocks that nobody holds, in eviction order: a heap whose stale entries are skipped.

    Args:
        key: the eviction policy.
        describe: what is known about a block.
    """

    def __init__(self, key: Key, describe: Callable[[int], CachedBlock]) -> None:
        self._key = key
        self._describe = describe
        self._heap: list[tuple[float, int, int, int]] = []
        self._ticket: dict[int, int] = {}  # block -> serial number of its only valid heap entry
        self._serial = 0
        self._floor = 0.0

    def __len__(self) -> int:
        return len(self._ticket)

    def add(self, block: int) -> None:
        about = self._describe(block)
        self._serial += 1
        self._ticket[block] = self._serial
        heapq.heappush(self._heap, (self._key(about, self._floor), -about.depth, self._serial, block))
        if len(self._heap) > 2 * len(self._ticket) + 64:
            self._heap = [entry for entry in self._heap if self._ticket.get(entry[3]) == entry[2]]
            heapq.heapify(self._heap)

    def remove(self, block: int) -> None:
        del self._ticket[block]

    def pop(self) -> int:
        """Takes out the block that should go first.

        Raises:
            IndexError: there is none.
        """
        while True:
            key, _, serial, block = heapq.heappop(self._heap)
            if self._ticket.get(block) == serial:
                del self._ticket[block]
                self._floor = key
                return block
