"""From logits to tokens. Plain functions without state: all that a choice depends on is in its `SampleRow`.

The steps and their order are vLLM's: allowed tokens, bad words, minimum length, logit bias, penalties, and then
`kernels.sample`. Log probabilities are those of the raw logits, before any of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill import kernels
from tokenmill.engine.plan import SampleRow
from tokenmill.types import SamplingParams, TokenLogprobs

__all__ = ["Sampled", "prompt_logprobs", "sample_rows", "uniforms"]

Number = TypeVar("Number", np.float32, np.int64)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""The increment of SplitMix64: odd, near 2^64 divided by the golden ratio."""
_CHUNK = 64
"""Rows of a prompt to compute log probabilities of at a time; bounds the extra memory."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """What was chosen, one entry per row."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    """None for the rows that did not ask."""


def sample_rows(logits: Tensor, rows: Sequence[SampleRow]) -> Sampled:
    """Chooses the next token of each row.

    Args:
        logits: [R, V], any floating dtype; used up: what forbids, favours or penalises tokens is applied in place.
        rows: what each of the R rows asks for. A row's token does not depend on the other rows.
    """
    logits = logits.float()
    params = [row.params for row in rows]
    wanted = {index: p.logprobs for index, p in enumerate(params) if p.logprobs is not None}
    raw = logits[list(wanted)]  # a copy of what is about to change
    for own, row in zip(logits, rows, strict=True):
        _restrict(own, row)
        _penalize(own, row)
    device = logits.device
    chosen = kernels.sample(
        logits,
        _column([0.0 if p.greedy else p.temperature for p in params], np.float32, device),
        _column([max(p.top_k, 0) for p in params], np.int64, device),
        _column([p.top_p for p in params], np.float32, device),
        _column([p.min_p for p in params], np.float32, device),
        torch.from_numpy(uniforms([row.seed for row in rows], [row.position for row in rows])).to(device),
    )
    found: list[TokenLogprobs | None] = [None] * len(rows)
    if wanted:
        for index, entry in zip(wanted, _token_logprobs(raw, chosen[list(wanted)], max(wanted.values())), strict=True):
            kept = wanted[index] + 1
            found[index] = TokenLogprobs(entry.token_ids[:kept], entry.logprobs[:kept], entry.rank)
    return Sampled(chosen.tolist(), found)


def prompt_logprobs(logits: Tensor, next_tokens: Sequence[int], k: int) -> list[TokenLogprobs]:
    """Log probabilities of the tokens that do follow in a prompt.

    Args:
        logits: [T, V], any floating dtype; not changed.
        next_tokens: the T tokens after each position.
        k: most likely tokens to report beside each.
    """
    tokens = _column(next_tokens, np.int64, logits.device)
    found: list[TokenLogprobs] = []
    for start in range(0, len(tokens), _CHUNK):
        found += _token_logprobs(logits[start : start + _CHUNK].float(), tokens[start : start + _CHUNK], k)
    return found


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each pair of a 64-bit seed and a position, the same whenever and wherever it is drawn.

    It is the output number `position` of a SplitMix64 generator (Steele et al., "Fast splittable pseudorandom number
    generators", 2014) that starts from a hash of the seed, so that neighbouring seeds are not shifted copies.
    """
    state = _mix(np.array(seeds, np.int64).view(np.uint64) + _GAMMA)
    index = np.array(positions, np.int64).view(np.uint64)
    bits = _mix(state + (index + np.uint64(1)) * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: a bijection in which each bit of the input moves about half of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _column(values: Sequence[float], dtype: type[Number], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(values, dtype)).to(device)


def _penalizes(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _restrict(logits: Tensor, row: SampleRow) -> None:
    """Applies what names tokens, in place, to one row's logits[V]."""
    params, device = row.params, logits.device
    if params.allowed_token_ids is not None:
        allowed = _column(params.allowed_token_ids, np.int64, device)
        kept = logits[allowed]
        logits.fill_(float("-inf"))
        logits[allowed] = kept
    forbidden = [word[-1] for word in params.bad_words_ids if _ends_with(row.history, word[:-1])]
    if row.generated < params.min_tokens:
        forbidden += row.stop_ids
    if forbidden:
        logits[_column(forbidden, np.int64, device)] = float("-inf")
    if params.logit_bias:
        biased = _column(list(params.logit_bias), np.int64, device)
        logits[biased] += _column(list(params.logit_bias.values()), np.float32, device)


def _ends_with(history: Sequence[int], tail: list[int]) -> bool:
    return not tail or list(history[-len(tail) :]) == tail


def _penalize(logits: Tensor, row: SampleRow) -> None:
    """Applies the penalties, in place, to one row's logits[V]: repetition to all tokens, the others to the output."""
    params = row.params
    if not _penalizes(params):
        return
    history = np.array(row.history, np.int64)
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(history)).to(logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    output, counts = np.unique(history[row.prompt_len :], return_counts=True)
    penalty = torch.from_numpy(counts).to(logits) * params.frequency_penalty + params.presence_penalty
    logits[torch.from_numpy(output).to(logits.device)] -= penalty


def _token_logprobs(logits: Tensor, tokens: Tensor, k: int) -> list[TokenLogprobs]:
    own, rank, top_ids, top = kernels.token_logprobs(logits, tokens, min(k, logits.shape[1]))
    columns = (tokens.tolist(), own.tolist(), rank.tolist(), top_ids.tolist(), top.tolist())
    return [
        TokenLogprobs([token, *others], [logprob, *their], place)
        for token, logprob, place, others, their in zip(*columns, strict=True)
    ]
