"""From logits to tokens. Plain functions without state: all that a choice depends on is in its `SampleRow`.

The steps and their order are vLLM's: grammar, allowed tokens, bad words, minimum length, logit bias, penalties, and
then `kernels.sample`. Log probabilities are those of the raw logits, before any of this.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill import kernels
from tokenmill.engine.grammar import Mask
from tokenmill.engine.plan import SampleRow
from tokenmill.types import SamplingParams, TokenLogprobs

__all__ = ["Sampled", "column_tensor", "prompt_logprobs", "sample_rows", "uniforms"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""The increment of SplitMix64: odd, near 2^64 divided by the golden ratio."""
_CHUNK = 64
"""Rows of a prompt to compute log probabilities of at a time; bounds the extra memory."""
_DTYPES = {"i": torch.int32, "q": torch.int64, "f": torch.float32, "d": torch.float64}
"""By the type code of an array."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """What was chosen, one entry per row."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    """None for the rows that did not ask."""
    stuck: list[int]
    """Rows with a mask for which no token is left; what is said of them above means nothing."""


def sample_rows(logits: Tensor, rows: Sequence[SampleRow], masks: Mapping[str, Mask] = MappingProxyType({})) -> Sampled:
    """Chooses the next token of each row.

    Args:
        logits: [R, V], any floating dtype; used up: what forbids, favours or penalises tokens is applied in place.
        rows: what each of the R rows asks for. A row's token does not depend on the other rows.
        masks: what the grammars of those that have one forbid, by request.
    """
    logits = logits.float()
    device = logits.device
    params = [row.params for row in rows]
    wanted = {index: p.logprobs for index, p in enumerate(params) if p.logprobs is not None}
    raw = logits[list(wanted)] if wanted else logits  # a copy of what is about to change
    masked = [index for index, row in enumerate(rows) if row.request_id in masks] if masks else []
    for index in masked:
        _mask(logits, index, masks[rows[index].request_id])
    for index, row in enumerate(rows):
        _restrict(logits, index, row)
    stuck = [index for index in masked if _is_stuck(logits, index, rows[index], masks[rows[index].request_id])]
    if stuck:
        logits[stuck] = 0.0  # what follows must have something to choose from
    _penalize(logits, rows)
    temperatures = [0.0 if p.greedy else p.temperature for p in params]
    uniform = np.zeros(len(rows))
    if any(temperatures):
        uniform = uniforms([row.seed for row in rows], [row.position for row in rows])
    chosen = kernels.sample(
        logits,
        _column("f", temperatures, device),
        _column("q", [max(p.top_k, 0) for p in params], device),
        _column("f", [p.top_p for p in params], device),
        _column("f", [p.min_p for p in params], device),
        torch.from_numpy(uniform).to(device),
    )
    found: list[TokenLogprobs | None] = [None] * len(rows)
    if wanted:
        for index, entry in zip(wanted, _token_logprobs(raw, chosen[list(wanted)], max(wanted.values())), strict=True):
            kept = wanted[index] + 1
            found[index] = TokenLogprobs(entry.token_ids[:kept], entry.logprobs[:kept], entry.rank)
    return Sampled(chosen.tolist(), found, stuck)


def prompt_logprobs(logits: Tensor, next_tokens: Sequence[int], k: int) -> list[TokenLogprobs]:
    """Log probabilities of the tokens that do follow in a prompt.

    Args:
        logits: [T, V], any floating dtype; not changed.
        next_tokens: the T tokens after each position.
        k: most likely tokens to report beside each.
    """
    tokens = _column("q", next_tokens, logits.device)
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


def column_tensor(column: array[Any], device: torch.device) -> Tensor:
    """An array of type i, q, f or d as a tensor of that type on `device`. Shares its memory where that is the CPU."""
    if not column:  # which has no memory to share
        return torch.empty(0, dtype=_DTYPES[column.typecode], device=device)
    return torch.frombuffer(column, dtype=_DTYPES[column.typecode]).to(device)


def _column(typecode: str, values: Iterable[float], device: torch.device) -> Tensor:
    return column_tensor(array(typecode, values), device)


def _penalizes(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _mask(logits: Tensor, index: int, mask: Mask) -> None:
    """Applies a grammar, in place, to one row of logits [R, V]."""
    tokens = torch.from_numpy(mask.token_ids).to(logits.device)
    if mask.allow:
        _allow(logits, index, tokens)
    else:
        logits[index, tokens] = float("-inf")


def _allow(logits: Tensor, index: int, tokens: Tensor) -> None:
    """Forbids all other tokens, in place, in one row of logits [R, V]."""
    kept = logits[index, tokens]
    logits[index] = float("-inf")
    logits[index, tokens] = kept


def _restrict(logits: Tensor, index: int, row: SampleRow) -> None:
    """Applies what names tokens, in place, to one row of logits [R, V]."""
    params, device = row.params, logits.device
    if params.allowed_token_ids is not None:
        _allow(logits, index, _column("q", params.allowed_token_ids, device))
    forbidden = [word[-1] for word in params.bad_words_ids if _ends_with(row.history, word[:-1])]
    if row.generated < params.min_tokens:
        forbidden += row.stop_ids
    if forbidden:
        logits[index, _column("q", forbidden, device)] = float("-inf")
    if params.logit_bias:
        biased = _column("q", params.logit_bias, device)
        logits[index, biased] += _column("f", params.logit_bias.values(), device)


def _is_stuck(logits: Tensor, index: int, row: SampleRow, mask: Mask) -> bool:
    """Whether one row of logits [R, V] allows no token, after all that restricts it."""
    params = row.params
    others = params.allowed_token_ids is not None or params.bad_words_ids or row.generated < params.min_tokens
    return mask.dead or (bool(others) and logits[index].max().item() == float("-inf"))


def _ends_with(history: Sequence[int], tail: list[int]) -> bool:
    return not tail or list(history[-len(tail) :]) == tail


def _penalize(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Applies the penalties, in place, to logits [R, V]; to a row without any as to one without a history."""
    if not any(_penalizes(row.params) for row in rows):
        return
    history, ends, prompt_lens = array("q"), [0], []
    for row in rows:
        counts = _penalizes(row.params)
        history.extend(row.history if counts else ())
        ends.append(len(history))
        prompt_lens.append(row.prompt_len if counts else 0)
    params, device = [row.params for row in rows], logits.device
    kernels.penalize(
        logits,
        column_tensor(history, device),
        _column("q", ends, device),
        _column("q", prompt_lens, device),
        _column("f", [p.repetition_penalty for p in params], device),
        _column("f", [p.frequency_penalty for p in params], device),
        _column("f", [p.presence_penalty for p in params], device),
    )


def _token_logprobs(logits: Tensor, tokens: Tensor, k: int) -> list[TokenLogprobs]:
    own, rank, top_ids, top = kernels.token_logprobs(logits, tokens, min(k, logits.shape[1]))
    columns = (tokens.tolist(), own.tolist(), rank.tolist(), top_ids.tolist(), top.tolist())
    return [
        TokenLogprobs([token, *others], [logprob, *their], place)
        for token, logprob, place, others, their in zip(*columns, strict=True)
    ]
