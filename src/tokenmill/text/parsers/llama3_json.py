"""Llama 3, and 4 with its own template: calls are JSON objects with ``name`` and ``parameters``, split by semicolons.

They follow the token ``<|python_tag|>``, or begin the answer without it. An object with any other first key is an
answer in JSON and goes out as it comes.

Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/prompt_format.md
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import ClassVar

from tokenmill.text.dialect import AddedId, Dialect, Functions, Kind, Parser, lark_calls
from tokenmill.text.markup import Found, Reader, StreamParser, call_of, calls_in_content

_KEYS = ("name", "parameters", "arguments", "type")


class Llama3Json(Dialect):
    kinds: ClassVar[frozenset[Kind]] = frozenset({"tools"})
    keeps_special_tokens: ClassVar[bool] = True
    dropped: ClassVar[tuple[str, ...]] = (
        *("<|eom_id|>", "<|eot_id|>", "<|end_of_text|>"),
        *("<|eom|>", "<|eot|>", "<|python_start|>", "<|python_end|>"),  # Llama 4
    )

    def detect(self, chat_template: str) -> bool:
        return '{"name": function name, "parameters": dictionary' in chat_template.replace('\\"', '"')

    def parser(self, functions: Functions, prompt: str = "") -> Parser:
        def read(reader: Reader) -> Generator[Found | None, None, None]:
            yield from reader.spaces()
            while True:
                text = yield from reader.json(_KEYS)
                yield call_of(text, functions)
                yield from reader.spaces()
                if not (yield from reader.literal(";")):
                    return
                yield from reader.spaces()

        return StreamParser(calls_in_content("<|python_tag|>", read, bare="{"), self.new_id)

    def calls_grammar(self, functions: Functions, parallel: bool, added_id: AddedId) -> str:
        calls = lark_calls(functions, lambda name: f'{{"name": {json.dumps(name)}, "parameters": ')
        more = ' ("; " call)*' if parallel else ""
        return f'calls: call{more}\ncall: ({calls}) "}}"\n'


DIALECT = Llama3Json()
