"""Log probabilities in the three forms that clients know."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import JSON, TokenLogprobs

__all__ = ["chat_logprobs", "completion_logprobs", "prompt_logprobs"]

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not know (OpenAI's value)."""


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> JSON:
    """``choices[].logprobs`` of a chat answer: one entry of ``content`` per token."""

    def one(token_id: int, logprob: float) -> JSON:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": max(logprob, _LOWEST),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = []
    for entry in entries:
        chosen, *top = map(one, entry.token_ids, entry.logprobs)
        content.append({**chosen, "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], offset: int = 0
) -> JSON:
    """``choices[].logprobs`` of a completion.

    Args:
        token_ids: the tokens that the entries are about; the first of a prompt has no entry.
        offset: characters before the first token, in the text of the choice.
    """
    tokens = [tokenizer.token_text(token_id) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if entry is None else max(entry.logprobs[0], _LOWEST) for entry in entries],
        "top_logprobs": [None if entry is None else _by_text(tokenizer, entry) for entry in entries],
        "text_offset": offsets,
    }


def _by_text(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, float]:
    """The token itself and the most likely ones. Of tokens that look the same, the first counts."""
    pairs = reversed(list(zip(entry.token_ids, entry.logprobs, strict=True)))
    return {tokenizer.token_text(token_id): max(logprob, _LOWEST) for token_id, logprob in pairs}


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None]) -> list[JSON | None]:
    """vLLM's ``prompt_logprobs``: per prompt token, what is known by token id."""
    return [None if entry is None else _by_id(tokenizer, entry) for entry in entries]


def _by_id(tokenizer: Tokenizer, entry: TokenLogprobs) -> JSON:
    ranks = [entry.rank, *range(1, len(entry.token_ids))]
    return {
        str(token_id): {
            "logprob": max(logprob, _LOWEST),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True)
    }
