"""The prefix cache: which KV is already known for the beginning of a prompt.

Only full blocks are shared. A block is named by a digest of its parent's digest and its own token ids, so that equal
digests mean equal text from the very first token. What makes equal text incomparable (a tenant's salt, an adapter, the
items of a multimodal prompt) goes into the digest that the chain starts from. KV tensors are never hashed.

Block ids differ between the groups of a model (full attention, each window), digests do not; a prefix is hit only as
far as every group can serve it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["Fingerprint", "MissLog", "block_digest", "root_digest"]

V = TypeVar("V")

_DIGEST_BYTES = 16


def root_digest(extra: Iterable[str]) -> bytes:
    """Where a chain starts. Empty extra keys all give the same root; any other set gives its own."""
    parts = [part.encode() for part in extra]
    if not any(parts):
        return b""
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of one full block after `parent`. 128 bits of BLAKE2b: a tenant cannot construct a collision."""
    return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


class Fingerprint:
    """The digests of a growing token sequence, one per full block.

    Args:
        block_size: tokens per block.
        salt: tenant's cache salt.
        adapter: adapter name.
    """

    def __init__(self, block_size: int, salt: str = "", adapter: str = "") -> None:
        self._block_size = block_size
        self.identity = (salt, adapter)
        self._root = root_digest(self.identity)
        self.digests: list[bytes] = []
        self.plain: list[bytes] = []
        """The same chain without extra keys: tells 'the same text under another salt' from 'new text'."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Brings the digests up to date with `token_ids`, which only ever grows at the end."""
        size = self._block_size
        for index in range(len(self.digests), len(token_ids) // size):
            block = token_ids[index * size : (index + 1) * size]
            parent = self.digests[-1] if self.digests else self._root
            self.digests.append(block_digest(parent, block))
            if self._root:
                self.plain.append(block_digest(self.plain[-1] if self.plain else b"", block))
            else:
                self.plain.append(self.digests[-1])


class MissLog:
    """Remembers what is no longer, or only elsewhere, in the cache, so that a miss can be explained. Bounded.

    Args:
        capacity: digests to remember of each kind.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._gone: OrderedDict[bytes, str] = OrderedDict()
        self._owners: OrderedDict[bytes, tuple[str, str]] = OrderedDict()

    def gone(self, digest: bytes, reason: str) -> None:
        """The content `digest` left the cache for `reason` (``evicted`` or ``expired``)."""
        _remember(self._gone, digest, reason, self._capacity)

    def owned(self, plain: bytes, identity: tuple[str, str]) -> None:
        """The text `plain` was cached for `identity`, its salt and adapter."""
        _remember(self._owners, plain, identity, self._capacity)

    def reason(self, digest: bytes, plain: bytes, identity: tuple[str, str]) -> str:
        """Why a full block is not in the cache: ``evicted``, ``expired``, ``salt``, ``adapter`` or ``cold``."""
        if digest in self._gone:
            return self._gone[digest]
        owner = self._owners.get(plain, identity)
        if owner[0] != identity[0]:
            return "salt"
        return "adapter" if owner[1] != identity[1] else "cold"


def _remember(memory: OrderedDict[bytes, V], key: bytes, value: V, capacity: int) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > capacity:
        memory.popitem(last=False)
