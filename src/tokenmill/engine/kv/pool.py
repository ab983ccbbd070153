"""The block pool: who holds which block of KV memory.

A block is `block_size` token slots in every physical KV buffer. Block 0 is the null block: table entries that nobody
will read point to it, it is never handed out. Each other block is in exactly one state:

    held        reference count > 0; one or more block tables (or a pin) list it
    evictable   count 0, but its content is known to the prefix cache and may be hit again
    free        count 0 and its content is worthless; on the free list
"""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.engine.kv.eviction import EvictableBlocks

__all__ = ["NULL_BLOCK", "BlockPool"]

NULL_BLOCK = 0


class BlockPool:
    """Reference counts, the free list, and the order of eviction. Taking and releasing are O(1) but for the eviction
    heap.

    Args:
        num_blocks: blocks in the physical buffers, the null block included.
        evictable: the cached blocks that nobody holds, in eviction order.
        forget: called with a block whose content is about to be overwritten, so that the prefix cache drops it.
    """

    def __init__(self, num_blocks: int, evictable: EvictableBlocks, forget: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        # A stack: the block released last is taken first, while it is still warm in the processor's caches.
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._evictable = evictable
        self._forget = forget

    @property
    def usable(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - 1

    @property
    def available(self) -> int:
        """Blocks that can be taken now: free or evictable."""
        return len(self._free) + len(self._evictable)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds but whose content may be hit again."""
        return len(self._evictable)

    def references(self, block: int) -> int:
        return self._refs[block]

    def take(self) -> int:
        """Hands out a block with one reference; evicts cached content when nothing is free.

        Raises:
            IndexError: nothing is available; callers check `available` first.
        """
        if self._free:
            block = self._free.pop()
        else:
            block = self._evictable.pop()
            self._forget(block)
        self._refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """Adds a reference to a block that is held or evictable."""
        if self._refs[block] == 0:
            self._evictable.remove(block)
        self._refs[block] += 1

    def release(self, block: int, cached: bool) -> None:
        """Drops a reference. The last one makes the block evictable if its content is `cached`, else free."""
        if block == NULL_BLOCK:
            return
        if self._refs[block] <= 0:
            raise AssertionError(f"block {block} released more often than taken")
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if cached:
                self._evictable.add(block)
            else:
                self._free.append(block)

    def discard(self, block: int) -> None:
        """Moves an evictable block to the free list: its content is no longer known."""
        self._evictable.remove(block)
        self._free.append(block)
