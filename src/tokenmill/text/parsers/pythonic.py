"""Llama 4 and other models that call in Python: the whole answer is a list such as ``[f(a=1), g(b="x")]``.

Arguments are keywords with literals, among them JSON's ``true``, ``false`` and ``null``. They are read as a syntax tree
and never evaluated.

Sources: https://github.com/meta-llama/llama-models/blob/main/models/llama4/prompt_format.md and
https://github.com/meta-llama/llama-models/blob/main/models/llama3_2/text_prompt_format.md
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Generator, Mapping
from typing import Any, ClassVar

from tokenmill.text.dialect import AddedId, Dialect, Functions, Kind, Parser, lark_json, lark_text
from tokenmill.text.markup import Found, Malformed, Reader, StreamParser, calls_in_content, checked_call

_NAME = re.compile(r"[\w.]+")
_WORDS = {"true": True, "false": False, "null": None}


class Pythonic(Dialect):
    kinds: ClassVar[frozenset[Kind]] = frozenset({"tools"})

    def detect(self, chat_template: str) -> bool:
        return "func_name1(" in chat_template

    def parser(self, functions: Functions, prompt: str = "") -> Parser:
        def read(reader: Reader) -> Generator[Found | None, None, None]:
            yield from reader.expect("[")
            while True:
                yield from reader.spaces()
                name = yield from reader.take(_NAME)
                if name not in functions:
                    raise Malformed
                yield checked_call(name, _json((yield from reader.python_call())), functions)
                yield from reader.spaces()
                if (yield from reader.literal("]")):
                    return
                yield from reader.expect(",")

        return StreamParser(calls_in_content("", read, bare="["), self.new_id)

    def calls_grammar(self, functions: Functions, parallel: bool, added_id: AddedId) -> str:
        calls = " | ".join(f"call_{i}" for i in range(len(functions)))
        more = ' (", " call)*' if parallel else ""
        rules = [f'calls: "[" call{more} "]"\n', f"call: {calls}\n"]
        for i, (name, schema) in enumerate(functions.items()):
            keywords, values = _keywords(i, schema)
            rules += [f'call_{i}: {lark_text(f"{name}(")} {keywords} ")"\n', *values]
        return "".join(rules)


def _json(call: str) -> str:
    """The keyword arguments of a call, given with its parentheses, as the text of a JSON object."""
    try:
        node = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            raise Malformed
        return json.dumps({_keyword(each): _value(each.value) for each in node.keywords}, ensure_ascii=False)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all that ast.parse raises on texts
        raise Malformed from None


def _keyword(keyword: ast.keyword) -> str:
    if keyword.arg is None:  # **values
        raise Malformed
    return keyword.arg


def _value(node: ast.expr) -> Any:
    """The value of a literal.

    Raises:
        Malformed: it is none, or one that JSON does not have.
    """
    match node:
        case ast.Constant(str() as text):
            # Halves of a surrogate pair, written as JSON's escapes, are one character; half of one is an error.
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        case ast.Constant(bool() | int() | float() | None as value):
            return value
        case ast.Name(word) if word in _WORDS:
            return _WORDS[word]
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)):
            return -number
        case ast.List(items) | ast.Tuple(items):
            return [_value(item) for item in items]
        case ast.Dict(keys, values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
    raise Malformed


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise Malformed


def _keywords(index: int, schema: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Lark for the keywords of a function in the order of its schema, the required ones first, and rules of values."""
    properties: Mapping[str, Any] = schema.get("properties", {})
    required = [name for name in properties if name in schema.get("required", ())]
    optional = [name for name in properties if name not in required]
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rule = {name: f"value_{index}_{i}" for i, name in enumerate(properties)}
    rules = [f"{rule[name]}: {lark_json({**shared, **properties[name]})}\n" for name in properties]
    word = {name: f"{lark_text(f'{name}=')} {rule[name]}" for name in properties}
    after = [f'(", " {word[name]})?' for name in optional]
    if required:
        return " ".join([' ", " '.join(word[name] for name in required), *after]), rules
    starts = [" ".join([word[name], *after[i + 1 :]]) for i, name in enumerate(optional)]
    return (f"({' | '.join(starts)})?" if starts else ""), rules


DIALECT = Pythonic()
