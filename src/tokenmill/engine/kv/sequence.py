"""A token sequence with its place in KV memory.

There are no phases. `tokens` is what is known (prompt, then output); `computed` is how many of them have their KV in
the cache. A step computes some of the difference; when it vanishes the next token is sampled and becomes known.
Prefill, chunked prefill, a prefix hit, decoding and recomputation after a preemption are all this one case.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as TokenIds

from tokenmill.engine.kv.prefix import Fingerprint

__all__ = ["Sequence"]


class Sequence:
    """Known and computed tokens, and the blocks that hold them. Only the KV manager writes the fields about blocks.

    Args:
        prompt: token ids of the prompt.
        fingerprint: empty, with the block size and extra keys of this sequence.
        reusable: whether cached KV may stand in for computing the prompt.
    """

    __slots__ = ("computed", "fingerprint", "prompt_len", "registered", "reusable", "tables", "tokens")

    def __init__(self, prompt: TokenIds[int], fingerprint: Fingerprint, reusable: bool = True) -> None:
        self.tokens = array("q", prompt)
        self.prompt_len = len(self.tokens)
        self.computed = 0
        self.tables: list[list[int]] = []
        """One block table per KV group; empty while no blocks are held."""
        self.registered = 0
        """Leading blocks that the prefix cache knows."""
        self.fingerprint = fingerprint
        self.reusable = reusable

    @property
    def pending(self) -> int:
        """Known tokens that are not computed yet; 1 for a request that decodes."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def decoding(self) -> bool:
        """Whether at least one token was generated and one more computed token yields the next."""
        return self.pending == 1 and self.generated > 0
