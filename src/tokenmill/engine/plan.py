"""The two messages of a step: what to compute, and what came of it. Both are immutable."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tokenmill.types import ErrorInfo, FinishReason, PoolingParams, SamplingParams, TokenLogprobs

__all__ = ["PlannedRow", "PoolRow", "RowResult", "SampleRow", "StepPlan", "StepResult"]


class SampleRow(msgspec.Struct, frozen=True):
    """What the sampler needs to choose one token. Holds no state, so a preemption cannot lose any."""

    request_id: str
    params: SamplingParams
    seed: int
    position: int
    """Index in the sequence of the token to be chosen."""
    generated: int
    """Tokens generated so far."""
    history: Sequence[int]
    """All known tokens, prompt first."""
    prompt_len: int
    stop_ids: tuple[int, ...]
    """End-of-text and stop tokens: forbidden until `min_tokens` are generated."""


class PoolRow(msgspec.Struct, frozen=True):
    """What the pooler needs beside the hidden states of a row."""

    params: PoolingParams
    total: bytes
    """Sum of the states of all tokens before the row's, float64; empty when there are none or none is needed."""
    prompt_len: int
    last: bool
    """Whether the row's tokens are the last of the prompt."""


class PlannedRow(msgspec.Struct, frozen=True):
    """Tokens of one request to compute in this step, at positions ``start .. start + len(tokens) - 1``."""

    request_id: str
    start: int
    tokens: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]
    """One block table per KV group; they cover all positions up to the last of `tokens`."""
    sample: SampleRow | None
    """Set when these are the last known tokens, so that the next one can be chosen."""
    scored: tuple[int, ...] = ()
    """The prompt tokens that follow each of `tokens`, where prompt log probabilities are asked for."""
    scores: int = 0
    """Most likely tokens to report for each of `scored`."""
    pool: PoolRow | None = None
    """Set for a request that wants an embedding."""


class StepPlan(msgspec.Struct, frozen=True):
    """One step. `copies` come before anything is written."""

    step: int
    rows: tuple[PlannedRow, ...]
    copies: tuple[tuple[int, int], ...] = ()
    """(source, destination) blocks."""
    padding: int = 0
    """Tokens computed for nothing, so that a padded batch costs what it costs."""

    @property
    def tokens(self) -> int:
        """Tokens that bring a request forward."""
        return sum(len(row.tokens) for row in self.rows)


class RowResult(msgspec.Struct, frozen=True):
    """What came of one row: the tokens chosen, none while a prompt is not finished."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One entry per token, when asked for."""
    scores: tuple[TokenLogprobs, ...] = ()
    """One entry per token of `PlannedRow.scored`."""
    pooled: bytes = b""
    """For an embedding: the sum so far (`PoolRow.total` of the next row), or what it is made to after the last row."""
    ended: FinishReason | None = None
    """Set, instead of tokens, when the request can have no next one."""
    error: ErrorInfo | None = None
    """Why, where that is an error."""


class StepResult(msgspec.Struct, frozen=True):
    """The results of a plan's rows, in their order."""

    step: int
    rows: tuple[RowResult, ...]
