"""xgrammar: a pushdown automaton whose masks are mostly computed while it compiles.

It drops keywords of a schema that it does not know, so only those that it is known to enforce are let through to it.

Source: https://github.com/mlc-ai/xgrammar
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.engine.grammar import refused
from tokenmill.errors import EngineError, MissingDependencyError
from tokenmill.types import StructuredOutput

__all__ = ["GRAMMAR"]

_LONGEST_WHITESPACE = 33
"""Between the tokens of JSON: a line end and the indentation of eight levels."""
_ENFORCED = {
    "$ref", "additionalProperties", "anyOf", "const", "enum", "exclusiveMaximum", "exclusiveMinimum", "items",
    "maxItems", "maxLength", "maximum", "minItems", "minLength", "minimum", "pattern", "prefixItems", "properties",
    "required", "type",
}  # fmt: skip
_ANNOTATIONS = {
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "examples",
    "readOnly", "title", "writeOnly",
}  # fmt: skip
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


class XGrammar:
    """See `engine.grammar.Backend`."""

    def __init__(self, path: Path, vocab_size: int, eos_ids: Sequence[int]) -> None:
        import tokenizers
        import xgrammar

        tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        vocabulary = [""] * max(vocab_size, tokenizer.get_vocab_size() + (not eos_ids))
        for token, index in tokenizer.get_vocab().items():
            vocabulary[index] = token
        kind = xgrammar.TokenizerInfo._detect_metadata_from_hf(tokenizer.to_str())
        # It wants an end-of-text token; one beyond all others never comes.
        info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=list(eos_ids) or [len(vocabulary) - 1], **kind)
        self._vocab_size = len(vocabulary)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    @staticmethod
    def require() -> None:
        if importlib.util.find_spec("xgrammar") is None:
            raise MissingDependencyError("xgrammar", "The grammar backend 'xgrammar'", "xgrammar")

    def compile(self, structured: StructuredOutput) -> _Matcher:
        import xgrammar

        if structured.json_schema is not None:
            _check(structured)
        try:
            return _Matcher(xgrammar.GrammarMatcher(self._compile(structured)), self._vocab_size)
        except Exception as error:  # the C++ library raises RuntimeError and others
            raise refused(structured, str(error)) from None

    def _compile(self, structured: StructuredOutput) -> Any:
        compiler = self._compiler
        if structured.json_schema is not None or structured.json_object:
            schema = structured.json_schema or '{"type": "object", "additionalProperties": true}'
            return compiler.compile_json_schema(schema, max_whitespace_cnt=_LONGEST_WHITESPACE)
        if structured.regex is not None:
            return compiler.compile_regex(structured.regex)
        if structured.choice is not None:
            return compiler.compile_grammar("root ::= " + " | ".join(map(json.dumps, structured.choice)))
        grammar = structured.grammar or ""
        if "::=" not in grammar:
            raise ValueError("xgrammar takes grammars in GBNF, with rules written as name ::= ...")
        return compiler.compile_grammar(grammar)


GRAMMAR = XGrammar


class _Matcher:
    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> _Matcher:
        return _Matcher(self._matcher.fork(), self._vocab_size)

    def accept(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not self._matcher.accept_token(token):
                raise EngineError("grammar_failed", f"The grammar does not allow token {token}.")

    def allowed(self) -> NDArray[np.uint8]:
        import xgrammar

        bits = xgrammar.allocate_token_bitmask(1, self._vocab_size)
        self._matcher.fill_next_token_bitmask(bits)
        found: NDArray[np.uint8] = bits[0].numpy().view(np.uint8)
        if not found.any():
            raise EngineError("grammar_failed", "The grammar allows no text.")
        return found

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_completed())


def _check(structured: StructuredOutput) -> None:
    """Refuses a schema with anything that would not be enforced."""
    try:
        parts = list(_parts(json.loads(structured.json_schema or "")))
    except (ValueError, RecursionError) as error:
        raise refused(structured, str(error)) from None
    except (AttributeError, TypeError):
        raise refused(structured, "properties, $defs and anyOf must hold what JSON Schema says") from None
    for part in parts:
        keys = part.keys() - _ANNOTATIONS
        if unknown := keys - _ENFORCED:
            raise refused(structured, f"xgrammar does not enforce {', '.join(sorted(unknown))}")
        if keys & _BOUNDS and part.get("type") != "integer":
            raise refused(structured, "xgrammar enforces bounds of integers only")
        if "pattern" in keys and keys & {"minLength", "maxLength"}:
            raise refused(structured, "xgrammar does not enforce pattern together with a length")
        for alone in keys & {"$ref", "anyOf", "enum", "const"}:
            if keys - {alone, "type"}:
                raise refused(structured, f"xgrammar does not enforce what stands beside {alone}")


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """All subschemas that are objects."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for name in ("properties", "$defs", "definitions"):
            waiting += (part.get(name) or {}).values()
        for name in ("anyOf", "prefixItems"):
            waiting += part.get(name) or []
        waiting += [part.get("items"), part.get("additionalProperties")]
