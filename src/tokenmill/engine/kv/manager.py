"""KV memory of all requests: block tables, prefix hits, copy-on-write, and what is given back.

Who owns what, for one sequence with S tokens per block and `computed` tokens done:

    block index   0 .. hit-1        hit .. computed//S - 1     computed//S ..          beyond
    content       shared prefix     full, own, registered      being filled, own       not allocated
    references    >= 1, read only   >= 1, read only            1, writable             -

A block with more than one reference is never written: `grow` copies it first. Window groups hold the null block where
the window has passed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Many

from tokenmill.engine.events import EventLog
from tokenmill.engine.kv.eviction import EVICTION, CachedBlock, EvictableBlocks
from tokenmill.engine.kv.pool import NULL_BLOCK, BlockPool
from tokenmill.engine.kv.prefix import Fingerprint, MissLog
from tokenmill.engine.kv.sequence import Sequence
from tokenmill.errors import RequestError
from tokenmill.models.spec import KVLayout
from tokenmill.types import Clock

__all__ = ["Hit", "KVManager"]


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
    """What the prefix cache holds for a request: `tokens` computed, in the blocks of one table per group."""

    tokens: int
    tables: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Pin:
    blocks: tuple[int, ...]
    until: float | None


class KVManager:
    """Block tables over one pool.

    Args:
        layout: groups and block size of the model.
        num_blocks: blocks in the physical buffers, the null block included.
        chunk: most tokens of one request computed in one step.
        prefix_caching: whether full blocks are kept and shared after use.
        eviction: key of `EVICTION`.
        ttl_s: seconds after its last use when cached content stops being used; 0 keeps it until evicted.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        chunk: int,
        clock: Clock,
        events: EventLog,
        *,
        prefix_caching: bool = True,
        eviction: str = "lru",
        ttl_s: float = 0.0,
    ) -> None:
        self.layout = layout
        self.block_size = layout.block_size
        self._chunk = chunk
        self._clock = clock
        self._events = events
        self._caching = prefix_caching
        self._eviction = eviction
        self._ttl = ttl_s
        self._about: dict[int, CachedBlock] = {}
        self._known: list[dict[bytes, int]] = [{} for _ in layout.groups]
        self._misses = MissLog(4 * num_blocks)
        self._pins: dict[str, _Pin] = {}
        self.pool = BlockPool(
            num_blocks, EvictableBlocks(EVICTION[eviction], self._about.__getitem__), self._forget_evicted
        )
        self.version = 0
        """Changes whenever the outcome of `lookup` may have changed."""

    # ---- what a request could get -------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Longest sequence that fits when it has the pool, less the pinned blocks, for itself."""
        return self._room(self.pinned)

    def _room(self, pinned: int) -> int:
        # One block per group is kept for copying a block that is shared with a pin.
        return self.layout.capacity(self.pool.usable - pinned - len(self.layout.groups), self._chunk)

    @property
    def pinned(self) -> int:
        """Blocks held by pins."""
        return len(self._pinned_blocks())

    def _pinned_blocks(self) -> set[int]:
        return {block for pin in self._pins.values() for block in pin.blocks}

    def fingerprint(self, sequence: Sequence) -> Fingerprint:
        """The sequence's digests, brought up to date with its tokens."""
        sequence.fingerprint.extend(sequence.tokens)
        return sequence.fingerprint

    def lookup(self, sequence: Sequence) -> Hit:
        """The longest cached prefix of a request that holds no blocks. At least its last token is left to compute.

        Changes nothing but that expired content on the way is forgotten.
        """
        if not self._caching or not sequence.reusable:
            return Hit(0, tuple(() for _ in self.layout.groups))
        digests = self.fingerprint(sequence).digests
        return self._longest(digests, len(sequence.tokens))

    def _longest(self, digests: Many[bytes], tokens: int) -> Hit:
        """The hit every group can serve: full groups from the start, window groups back to where the window begins."""
        blocks, before = len(digests), -1
        while blocks != before:  # a shorter hit in one group moves the window of the others
            before = blocks
            for group, spec in enumerate(self.layout.groups):
                blocks = self._reach(group, spec.window, digests, blocks, tokens)
        start = min(blocks * self.block_size, tokens - 1)
        tables = []
        for group, spec in enumerate(self.layout.groups):
            first = self._first_visible(spec.window, start) if blocks else 0
            known = self._known[group]
            tables.append((NULL_BLOCK,) * first + tuple(known[digest] for digest in digests[first:blocks]))
        return Hit(start if blocks else 0, tuple(tables))

    def _reach(self, group: int, window: int | None, digests: Many[bytes], limit: int, tokens: int) -> int:
        """Most blocks, at most `limit`, that one group can serve as a prefix of a sequence of `tokens` tokens."""
        if window is None:
            for index in range(limit):
                if not self._live(group, digests[index]):
                    return index
            return limit
        end = index = limit
        while index > self._first_visible(window, min(end * self.block_size, tokens - 1)):
            index -= 1
            if not self._live(group, digests[index]):
                end = index
        return end

    def _live(self, group: int, digest: bytes) -> bool:
        block = self._known[group].get(digest)
        if block is None:
            return False
        idle = self._clock() - self._about[block].last_used
        if self._ttl and idle > self._ttl and self.pool.references(block) == 0:
            self.pool.discard(block)
            self._forget(block, "expired")
            return False
        return True

    def _first_visible(self, window: int | None, position: int) -> int:
        """Index of the first block that a query at `position` can see."""
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def explain_misses(self, sequence: Sequence, hit: Hit) -> dict[str, int]:
        """Prompt tokens not in `hit`, by reason. With the hit they add up to the prompt."""
        total, size = sequence.prompt_len, self.block_size
        if not self._caching:
            return {"disabled": total}
        if not sequence.reusable:
            return {"not_reusable": total}
        misses: dict[str, int] = {}
        fingerprint = self.fingerprint(sequence)
        full = total // size
        reason = ""
        for index in range(-(-hit.tokens // size), full):
            # A block behind a lost one is lost with it, whatever became of it.
            if reason not in ("evicted", "expired"):
                reason = self._misses.reason(fingerprint.digests[index], fingerprint.plain[index], fingerprint.identity)
            misses[reason] = misses.get(reason, 0) + size
        if hit.tokens % size:
            misses["last_token"] = total - hit.tokens
        elif total % size:
            misses["partial_block"] = total % size
        return misses

    # ---- taking blocks ------------------------------------------------------------------------------------------

    def can_admit(self, sequence: Sequence, hit: Hit, reserve: int) -> bool:
        """Whether the blocks for all its known tokens can be taken at once and `reserve` blocks still remain."""
        total = -(-len(sequence.tokens) // self.block_size)
        have = -(-hit.tokens // self.block_size)
        need = reserve
        for spec in self.layout.groups:
            new = total - have
            if spec.window is not None:
                new = min(new, -(-(spec.window - 1 + self._chunk) // self.block_size) + 1)
            need += new + (1 if hit.tokens % self.block_size else 0)
        revived = sum(1 for table in hit.tables for block in table if block and not self.pool.references(block))
        return need <= self.pool.available - revived

    def admit(self, sequence: Sequence, hit: Hit) -> None:
        """Gives the request its cached prefix and, in full groups, blocks for all its known tokens."""
        now = self._clock()
        sequence.tables = [list(table) for table in hit.tables]
        for table in sequence.tables:
            for block in table:
                if block != NULL_BLOCK:
                    self.pool.share(block)
                    about = self._about[block]
                    about.last_used, about.uses = now, about.uses + 1
        sequence.computed = hit.tokens
        sequence.registered = -(-hit.tokens // self.block_size)
        for table, spec in zip(sequence.tables, self.layout.groups, strict=True):
            if spec.window is None:
                self._extend(table, len(sequence.tokens))

    def can_fork(self, parent: Sequence, child: Sequence) -> bool:
        """Whether `child` can share the prompt blocks of `parent`: they are computed and no window has passed them."""
        start = child.prompt_len - 1
        if parent.computed < child.prompt_len or not parent.tables:
            return False
        return all(
            table[self._first_visible(spec.window, start)] != NULL_BLOCK
            for table, spec in zip(parent.tables, self.layout.groups, strict=True)
        ) and self.pool.available >= len(self.layout.groups)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Shares the prompt blocks of `parent`, the partly filled one included; only the last token is left to
        compute.
        """
        blocks = -(-child.prompt_len // self.block_size)
        child.tables = [table[:blocks] for table in parent.tables]
        for table in child.tables:
            for block in table:
                if block != NULL_BLOCK:
                    self.pool.share(block)
        child.computed = child.prompt_len - 1
        child.registered = min(parent.registered, child.prompt_len // self.block_size)

    def can_grow(self, sequence: Sequence, count: int) -> bool:
        """Whether the blocks for `count` more tokens can be taken."""
        blocks = -(-(sequence.computed + count) // self.block_size)
        writes = sequence.computed // self.block_size
        need = 0
        for table in sequence.tables:
            need += max(0, blocks - len(table))
            need += writes < len(table) and self.pool.references(table[writes]) > 1
        return need <= self.pool.available

    def grow(self, sequence: Sequence, count: int) -> list[tuple[int, int]]:
        """Takes blocks for `count` more tokens and makes the first written one the request's own.

        Returns:
            (source, destination) blocks whose content must be copied before the step writes.
        """
        copies = []
        writes = sequence.computed // self.block_size
        for table in sequence.tables:
            if writes < len(table) and self.pool.references(table[writes]) > 1:
                own = self.pool.take()
                copies.append((table[writes], own))
                self.pool.release(table[writes], table[writes] in self._about)
                table[writes] = own
            self._extend(table, sequence.computed + count)
        return copies

    def _extend(self, table: list[int], tokens: int) -> None:
        missing = -(-tokens // self.block_size) - len(table)
        table.extend(self.pool.take() for _ in range(missing))

    # ---- after a step, and giving back --------------------------------------------------------------------------

    def commit(self, sequence: Sequence) -> None:
        """Registers the blocks that `computed` has filled and gives back those that every window has passed."""
        full = sequence.computed // self.block_size
        if self._caching and full > sequence.registered:
            self._register(sequence, full)
        for table, spec in zip(sequence.tables, self.layout.groups, strict=True):
            if spec.window is None:
                continue
            for index in range(self._first_visible(spec.window, sequence.computed) - 1, -1, -1):
                if table[index] == NULL_BLOCK:
                    break
                self._release(table[index])
                table[index] = NULL_BLOCK

    def _register(self, sequence: Sequence, full: int) -> None:
        fingerprint = self.fingerprint(sequence)
        now = self._clock()
        for index in range(sequence.registered, full):
            digest = fingerprint.digests[index]
            self._misses.owned(fingerprint.plain[index], fingerprint.identity)
            for group, table in enumerate(sequence.tables):
                # Of two blocks with the same content the first stays known; the other is freed after use.
                if table[index] != NULL_BLOCK and digest not in self._known[group]:
                    self._known[group][digest] = table[index]
                    self._about[table[index]] = CachedBlock(digest, group, index, now)
        sequence.registered = full
        self.version += 1

    def freed_by(self, sequence: Sequence) -> int:
        """Blocks that become available when the request gives its blocks back."""
        return sum(1 for table in sequence.tables for block in table if block and self.pool.references(block) == 1)

    def release(self, sequence: Sequence) -> None:
        """Takes all blocks from the sequence. Registered content stays cached until it is evicted."""
        now = self._clock()
        for table in sequence.tables:
            for block in reversed(table):
                if block in self._about:
                    self._about[block].last_used = now
                self._release(block)
        sequence.tables = []
        sequence.computed = sequence.registered = 0

    def _release(self, block: int) -> None:
        self.pool.release(block, block in self._about)

    def _forget_evicted(self, block: int) -> None:
        self._events.add(self._clock(), "", "evict", self._eviction, self.block_size, 1)
        self._forget(block, "evicted")

    def _forget(self, block: int, reason: str) -> None:
        about = self._about.pop(block)
        del self._known[about.group][about.digest]
        self._misses.gone(about.digest, reason)
        self.version += 1

    # ---- pins ---------------------------------------------------------------------------------------------------

    def pin(
        self,
        name: str,
        token_ids: Many[int],
        keep: int,
        *,
        salt: str = "",
        adapter: str = "",
        ttl_s: float | None = None,
    ) -> int:
        """Keeps the cached part of a prefix from eviction until `unpin` or `ttl_s` seconds from now.

        Args:
            keep: longest sequence that must still fit beside the pins.

        Returns:
            Pinned tokens, 0 when nothing of the prefix is cached.

        Raises:
            RequestError: ``pin_too_large`` when a sequence of `keep` tokens would no longer fit.
        """
        self.unpin(name)
        fingerprint = Fingerprint(self.block_size, salt, adapter)
        fingerprint.extend(token_ids)
        hit = self._longest(fingerprint.digests, len(token_ids) + 1)
        blocks = tuple(block for table in hit.tables for block in table if block != NULL_BLOCK)
        pinned = self._pinned_blocks() | set(blocks)
        if self._room(len(pinned)) < keep:
            raise RequestError(
                "pin_too_large", f"Pinning {hit.tokens} tokens would leave no room for a request of {keep} tokens."
            )
        for block in blocks:
            self.pool.share(block)
        self._pins[name] = _Pin(blocks, None if ttl_s is None else self._clock() + ttl_s)
        return hit.tokens

    def unpin(self, name: str) -> bool:
        """Ends a pin. Returns whether there was one."""
        pin = self._pins.pop(name, None)
        for block in reversed(pin.blocks if pin else ()):
            self._release(block)
        return pin is not None

    def expire_pins(self) -> None:
        """Ends the pins whose time has come."""
        now = self._clock()
        for name in [name for name, pin in self._pins.items() if pin.until is not None and pin.until <= now]:
            self.unpin(name)
