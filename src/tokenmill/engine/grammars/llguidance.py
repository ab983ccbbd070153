"""llguidance: an Earley parser over regular-expression derivatives; masks are computed as they are needed.

It refuses what it cannot enforce.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md, .../json_schema.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import llguidance
import numpy as np
import tokenizers
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from tokenmill.engine.grammar import refused
from tokenmill.errors import EngineError, RequestError
from tokenmill.types import StructuredOutput

__all__ = ["GRAMMAR"]

_WHITESPACE = r"\x20|\x0A(\x20{0,32}|\x09{0,8})"
"""Between the tokens of JSON: what compact, spaced and indented texts have, and nothing that a model could loop on."""
_JSON_OPTIONS: llguidance._lib.JsonCompileOptions = {"whitespace_pattern": _WHITESPACE, "lenient": False}
_MAX_ITEMS = 10_000
"""In a row of the parser. An object needs four per property that may come next; the default allows 500 of them,
and this many take a mask of some 30 ms."""
_NO_END = "<|tokenmill: no end of text|>"


class LLGuidance:
    """See `engine.grammar.Backend`."""

    def __init__(self, path: Path, vocab_size: int, eos_ids: Sequence[int]) -> None:
        known = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        self._never: list[int] = []
        if not eos_ids:  # it wants one, so it gets one that never comes
            known.add_special_tokens([_NO_END])
            self._never = [known.get_vocab()[_NO_END]]
        size = max(vocab_size, known.get_vocab_size())
        try:
            self._tokenizer = llguidance.LLTokenizer(known.to_str(), size, list(eos_ids) or self._never)
        except ValueError as error:
            raise RequestError(
                "unsupported_parameter", f"Structured output cannot be had with this tokenizer: {error}.", "structured"
            ) from None
        self._limits = llguidance.LLParserLimits(max_items_in_row=_MAX_ITEMS)

    @staticmethod
    def require() -> None:
        pass  # tokenmill itself needs it

    def compile(self, structured: StructuredOutput) -> _Matcher:
        try:
            grammar = _grammar(structured)
        except Exception as error:  # of the converter and of the JSON reader, which share no base
            raise refused(structured, str(error) or type(error).__name__) from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise refused(structured, _reason(matcher))
        if warnings := matcher.get_grammar_warnings():
            raise refused(structured, "; ".join(warnings))
        return _Matcher(matcher, self._never)


GRAMMAR = LLGuidance


class _Matcher:
    def __init__(self, matcher: llguidance.LLMatcher, never: Sequence[int]) -> None:
        self._matcher = matcher
        self._never = never

    def copy(self) -> _Matcher:
        return _Matcher(self._matcher.deep_copy(), self._never)

    def accept(self, tokens: Sequence[int]) -> None:
        if not self._matcher.consume_tokens(list(tokens)):
            raise self._failed()

    def allowed(self) -> NDArray[np.uint8]:
        bits = np.frombuffer(bytearray(self._matcher.compute_bitmask()), np.uint8)
        if self._matcher.is_error():
            raise self._failed()
        for token in self._never:
            bits[token // 8] &= ~np.uint8(1 << token % 8)
        return bits

    @property
    def complete(self) -> bool:
        return self._matcher.is_accepting()

    def _failed(self) -> EngineError:
        return EngineError("grammar_failed", _reason(self._matcher))


def _grammar(structured: StructuredOutput) -> str:
    """The grammar in llguidance's own form."""
    from_schema = llguidance.LLMatcher.grammar_from_json_schema
    if structured.json_schema is not None:
        return from_schema(structured.json_schema, overrides=_JSON_OPTIONS)
    if structured.json_object:
        return from_schema({"type": "object"}, overrides=_JSON_OPTIONS)
    if structured.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(structured.regex)
    if structured.choice is not None:
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in structured.choice)
        return llguidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    grammar = structured.grammar or ""
    if re.search(r"^\s*[\w-]+\s*::=", grammar, re.MULTILINE):
        grammar = gbnf_to_lark(re.sub(r"\\(\\|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))", _character, grammar))
    return llguidance.LLMatcher.grammar_from_lark(grammar)


def _character(escape: re.Match[str]) -> str:
    """The character of an escape beyond ASCII, which the converter would write in a way that Lark cannot read."""
    code = int(escape[2] or escape[3] or "0", 16)
    return chr(code) if 0x80 <= code < 0xD800 or 0xDFFF < code <= 0x10FFFF else escape[0]


def _reason(matcher: llguidance.LLMatcher) -> str:
    """What llguidance says, without the parser's state that follows it."""
    said = matcher.get_error().split("<state>")[0].strip()
    if matcher.stop_reason() == "NoExtensionBias" or said == "NoExtensionBias":
        return "The grammar allows no text."
    return f"The parser stopped: {said or matcher.stop_reason()}"
