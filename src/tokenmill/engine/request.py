"""One request inside the engine: a sequence and what the scheduler knows about it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from tokenmill.engine.kv.prefix import Fingerprint
from tokenmill.engine.kv.sequence import Sequence
from tokenmill.engine.plan import PoolRow
from tokenmill.types import EngineRequest, FinishReason, RequestStats, SamplingParams, TokenLogprobs

__all__ = ["PREPARED", "Request"]

PREPARED: Future[Any] = Future()
"""For a request that needs no preparation."""
PREPARED.set_result(None)


class Request(Sequence):
    """State of a request from its arrival to its end. Only the scheduler writes it.

    Args:
        source: the request as it came.
        limit: most tokens to generate.
        seed: for sampling.
        block_size: tokens per KV block.
        now: when the engine accepted it.
        prepared: done once a token of it can be chosen.
    """

    __slots__ = (
        "cached_tokens",
        "deferred",
        "first_token",
        "hint",
        "limit",
        "misses",
        "pooled",
        "preemptions",
        "prepared",
        "prompt_logprobs",
        "queued_since",
        "recomputed",
        "scheduled",
        "seed",
        "source",
    )

    def __init__(
        self,
        source: EngineRequest,
        limit: int,
        seed: int,
        block_size: int,
        now: float,
        prepared: Future[Any] = PREPARED,
    ) -> None:
        fingerprint = Fingerprint(block_size, source.cache_salt, source.adapter)
        # Log probabilities of the prompt need its logits, and a mean all its states, so it must be computed.
        averaged = source.pooling is not None and source.pooling.pooling == "mean"
        reusable = source.params.prompt_logprobs is None and not averaged
        super().__init__(source.prompt_token_ids, fingerprint, reusable)
        self.source = source
        self.limit = limit
        self.seed = seed
        self.prepared = prepared
        self.hint: tuple[int, int] | None = None
        """(cache version, tokens) of the last look into the prefix cache while waiting."""
        self.queued_since = now
        self.scheduled: float | None = None
        self.first_token: float | None = None
        self.deferred = ""
        """Why it still waits."""
        self.preemptions = 0
        self.recomputed = 0
        self.cached_tokens = 0
        self.misses: dict[str, int] = {}
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.pooled = b""
        """What the last computed row brought to its embedding."""

    @property
    def id(self) -> str:
        return self.source.request_id

    @property
    def params(self) -> SamplingParams:
        return self.source.params

    def pool_row(self, end: int) -> PoolRow | None:
        """What the pooler needs for the tokens from `computed` to `end`, if an embedding is wanted."""
        if self.source.pooling is None:
            return None
        total = self.pooled if self.computed else b""  # after a preemption it begins anew
        return PoolRow(self.source.pooling, total, self.prompt_len, end == self.prompt_len)

    def finish_reason(self, token: int, eos_ids: frozenset[int]) -> FinishReason | None:
        """Why the request ends with `token`, its newest; None when it goes on."""
        params = self.params
        stops = token in params.stop_token_ids or (token in eos_ids and not params.ignore_eos)
        if stops and self.generated >= params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.generated >= self.limit else None

    def stats(self, now: float) -> RequestStats:
        """What happened to it, as of its end."""
        return RequestStats(
            arrival=self.source.arrival,
            scheduled=self.scheduled,
            first_token=self.first_token,
            finished=now,
            prompt_tokens=self.prompt_len,
            generated_tokens=self.generated,
            cached_tokens=self.cached_tokens,
            recomputed_tokens=self.recomputed,
            preemptions=self.preemptions,
            misses=self.misses,
        )
