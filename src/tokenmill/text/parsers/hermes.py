"""Hermes and Qwen: each call is a JSON object between ``<tool_call>`` and ``</tool_call>``, anywhere in the answer.

Sources: https://github.com/NousResearch/Hermes-Function-Calling and
https://qwen.readthedocs.io/en/latest/framework/function_call.html
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import ClassVar

from tokenmill.text.dialect import AddedId, Dialect, Functions, Kind, Parser, lark_calls, lark_marker
from tokenmill.text.markup import Found, Malformed, Reader, StreamParser, call_of, calls_in_content


class Hermes(Dialect):
    kinds: ClassVar[frozenset[Kind]] = frozenset({"tools"})

    def detect(self, chat_template: str) -> bool:
        # Others put XML between the same tags: Qwen3-Coder <function=...>, GLM-4.5 <arg_key>.
        xml = ("<function=", "<arg_key>")
        return "<tool_call>" in chat_template and not any(tag in chat_template for tag in xml)

    def parser(self, functions: Functions, prompt: str = "") -> Parser:
        def read(reader: Reader) -> Generator[Found | None, None, None]:
            yield from reader.spaces()
            text = yield from reader.json()
            yield from reader.spaces()
            # A model may stop instead of writing the closing tag.
            if not (yield from reader.literal("</tool_call>")) and (yield from reader.peek()):
                raise Malformed
            yield call_of(text, functions)

        return StreamParser(calls_in_content("<tool_call>", read), self.new_id)

    def calls_grammar(self, functions: Functions, parallel: bool, added_id: AddedId) -> str:
        calls = lark_calls(functions, lambda name: f'\n{{"name": {json.dumps(name)}, "arguments": ')
        opening, closing = (lark_marker(tag, added_id) for tag in ("<tool_call>", "</tool_call>"))
        more = r' ("\n" call)*' if parallel else ""
        return f'calls: call{more}\ncall: {opening} ({calls}) "}}\\n" {closing}\n'


DIALECT = Hermes()
