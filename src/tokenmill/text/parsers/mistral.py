"""Mistral: calls follow the token ``[TOOL_CALLS]``, as a JSON list or, in newer models, as a name and its arguments.

``[TOOL_CALLS] [{"name": "f", "arguments": {}}]`` up to version 7 of the tokenizer, ``[TOOL_CALLS]f[ARGS]{}`` from
version 11 on, where the opening is repeated for each call. Version 11 puts ``[CALL_ID]`` and an id before ``[ARGS]``.

Source: https://github.com/mistralai/mistral-common (``tokens/tokenizers/instruct.py``)
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Generator
from typing import ClassVar

from tokenmill.text.dialect import AddedId, Dialect, Functions, Kind, Parser, lark_calls, lark_marker
from tokenmill.text.markup import Found, Malformed, Reader, StreamParser, call_of, calls_in_content, checked_call

_NAME = re.compile(r"[\w.\-]+")
_ID = re.compile(r"\w+")


class Mistral(Dialect):
    kinds: ClassVar[frozenset[Kind]] = frozenset({"tools"})
    keeps_special_tokens: ClassVar[bool] = True
    dropped: ClassVar[tuple[str, ...]] = ("</s>",)

    def detect(self, chat_template: str) -> bool:
        return "[TOOL_CALLS]" in chat_template

    def parser(self, functions: Functions, prompt: str = "") -> Parser:
        def read(reader: Reader) -> Generator[Found | None, None, None]:
            yield from reader.spaces()
            yield from _list(reader) if (yield from reader.literal("[")) else _named(reader)

        def _list(reader: Reader) -> Generator[Found | None, None, None]:
            while True:
                yield from reader.spaces()
                yield call_of((yield from reader.json()), functions)
                yield from reader.spaces()
                if (yield from reader.literal("]")):
                    return
                yield from reader.expect(",")

        def _named(reader: Reader) -> Generator[Found | None, None, None]:
            name = yield from reader.take(_NAME)
            if name not in functions:
                raise Malformed
            if (yield from reader.literal("[CALL_ID]")):
                yield from reader.take(_ID)
            yield from reader.literal("[ARGS]")
            yield from reader.spaces()
            yield checked_call(name, (yield from reader.json()), functions)

        return StreamParser(calls_in_content("[TOOL_CALLS]", read), self.new_id)

    def calls_grammar(self, functions: Functions, parallel: bool, added_id: AddedId) -> str:
        opening = lark_marker("[TOOL_CALLS]", added_id)
        args = added_id("[ARGS]")
        if args is None:
            calls = lark_calls(functions, lambda name: f'{{"name": {json.dumps(name)}, "arguments": ')
            more = ' (", " call)*' if parallel else ""
            return f'calls: {opening} "[" call{more} "]"\ncall: ({calls}) "}}"\n'
        calls = " | ".join(f"{json.dumps(name)} <[{args}]> args_{i}" for i, name in enumerate(functions))
        return f"calls: call{'+' if parallel else ''}\ncall: {opening} ({calls})\n"

    def new_id(self) -> str:
        """Nine letters and digits: the models' templates refuse others."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


DIALECT = Mistral()
