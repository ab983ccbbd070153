"""Fill in the middle: what stands before and behind a gap, as one prompt in the form that the model was trained on.

Sources: arXiv 2207.14255 (prefix, suffix, middle), 2308.12950 (Code Llama), 2305.06161 (StarCoder), 2401.14196
(DeepSeek-Coder), 2409.12186 (Qwen2.5-Coder), https://ai.google.dev/gemma/docs/codegemma/model_card and
https://github.com/mistralai/mistral-common (Codestral).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tokenmill.errors import RequestError
from tokenmill.text.tokenizer import Tokenizer

__all__ = ["Infill", "infill"]


@dataclasses.dataclass(frozen=True)
class Infill:
    """A gap to fill, for the engine."""

    prompt_token_ids: list[int]
    stop_token_ids: list[int]
    """Tokens that end the middle beside the model's end-of-text tokens."""


@dataclasses.dataclass(frozen=True)
class _Marks:
    """The tokens that one kind of model is trained with."""

    prefix: str
    suffix: str
    middle: str = ""
    """Empty where the suffix comes first and the middle just continues the prefix."""
    ends: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        return [mark for mark in (self.prefix, self.suffix, self.middle) if mark]


_KNOWN = (
    # Qwen2.5-Coder, Qwen3 and CodeGemma
    _Marks(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    _Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>", "<file_sep>")),  # StarCoder, Granite
    _Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<|endoftext|>",)),  # SantaCoder
    _Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ("<｜end▁of▁sentence｜>",)),  # DeepSeek-Coder
    _Marks("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),  # Code Llama
    _Marks("[PREFIX]", "[SUFFIX]"),  # Codestral
)


def infill(tokenizer: Tokenizer, before: str | Sequence[int], behind: str) -> Infill:
    """The prompt that asks for what stands between two texts.

    As in a plain prompt, the text of a special token inside the two becomes that token.

    Args:
        before: the prompt, as text or token ids.
        behind: the suffix.

    Raises:
        RequestError: ``unsupported_parameter`` when the vocabulary has none of the known sets of marks.
    """
    marks = next((each for each in _KNOWN if all(tokenizer.token_id(mark) is not None for mark in each.all)), None)
    if marks is None:
        raise RequestError(
            "unsupported_parameter",
            "suffix needs a model that was trained to fill in the middle; "
            "the vocabulary of this one has no tokens for it, as <|fim_prefix|>.",
            "suffix",
        )
    ids = {mark: token for mark in (*marks.all, *marks.ends) if (token := tokenizer.token_id(mark)) is not None}
    prefix = tokenizer.encode(before, add_special_tokens=False) if isinstance(before, str) else list(before)
    first, last = [ids[marks.prefix], *prefix], [ids[marks.suffix], *_continuing(tokenizer, behind)]
    prompt = [*first, *last, ids[marks.middle]] if marks.middle else [*last, *first]
    return Infill([*_start(tokenizer), *prompt], [ids[mark] for mark in marks.ends if mark in ids])


def _start(tokenizer: Tokenizer) -> list[int]:
    """The token that begins every text of this model, if one does."""
    bos = tokenizer.token_id(tokenizer.special_tokens.get("bos_token", ""))
    return [token for token in tokenizer.encode("")[:1] if token == bos]


def _continuing(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text that does not begin one: without the space that SentencePiece puts before the first word."""
    if tokenizer.strip_start(b" "):
        return tokenizer.encode(text, add_special_tokens=False)
    mark = "☺"  # which merges with nothing
    alone = len(tokenizer.encode(mark, add_special_tokens=False))
    return tokenizer.encode(mark + text, add_special_tokens=False)[alone:]
