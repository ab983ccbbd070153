"""What a caller may give as a prompt, and the token ids of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, cast

import msgspec

from tokenmill.errors import RequestError
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import SamplingParams

__all__ = ["Prompt", "PromptDict", "as_prompts", "text_and_ids", "tokenize", "with_bad_words"]


class PromptDict(TypedDict, total=False):
    """A prompt as vLLM's dictionaries give it: one of the two keys."""

    prompt: str
    prompt_token_ids: list[int]


Prompt = str | Sequence[int] | PromptDict
"""Text, token ids, or a dictionary with one of them."""


def tokenize(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The token ids of a prompt.

    Raises:
        RequestError: ``invalid_prompt`` when it is none of the forms of `Prompt`.
    """
    return text_and_ids(tokenizer, prompt)[1]


def text_and_ids(tokenizer: Tokenizer, prompt: Prompt) -> tuple[str | None, list[int]]:
    """The text, if there is one, and the token ids of a prompt."""
    if isinstance(prompt, dict):
        if len(prompt.keys() & {"prompt", "prompt_token_ids"}) != 1:
            raise RequestError("invalid_prompt", "A prompt needs one of 'prompt' and 'prompt_token_ids'.", "prompt")
        prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    ids = list(prompt)
    if not all(isinstance(token, int) for token in ids):
        raise RequestError("invalid_prompt", "A prompt is a text or a list of token ids.", "prompt")
    return None, ids


def with_bad_words(tokenizer: Tokenizer, params: SamplingParams) -> SamplingParams:
    """The texts of `bad_words` as token sequences: each as it stands and as it is written after a space."""
    if not params.bad_words:
        return params
    ids = list(params.bad_words_ids)
    for word in params.bad_words:
        for text in (word.lstrip(), " " + word.lstrip()):
            sequence = tokenizer.encode(text, add_special_tokens=False)
            if sequence and sequence not in ids:
                ids.append(sequence)
    return msgspec.structs.replace(params, bad_words=[], bad_words_ids=ids)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt as a list of one; a list of prompts as it is."""
    if isinstance(prompts, str | dict):
        return [cast(Prompt, prompts)]
    many = list(cast(Sequence[Any], prompts))
    return [many] if many and isinstance(many[0], int) else many
