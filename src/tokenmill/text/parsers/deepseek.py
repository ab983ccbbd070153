"""DeepSeek V3, R1 and V3.1: a block of calls, each with a name and JSON arguments.

V3 and R1 write a type, the name, and the arguments in a fenced block, V3.1 only the name and the arguments::

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f
    ```json
    {}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>

Sources: https://huggingface.co/deepseek-ai/DeepSeek-R1-0528/blob/main/tokenizer_config.json and
https://huggingface.co/deepseek-ai/DeepSeek-V3.1#toolcall
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import ClassVar

from tokenmill.text.dialect import AddedId, Dialect, Functions, Kind, Parser, lark_marker, lark_text
from tokenmill.text.markup import Found, Malformed, Reader, StreamParser, calls_in_content, checked_call

_BEGIN_ALL, _END_ALL = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_BEGIN, _SEP, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_NAME = re.compile(r"[\w.\-]+")


class DeepSeek(Dialect):
    kinds: ClassVar[frozenset[Kind]] = frozenset({"tools"})
    keeps_special_tokens: ClassVar[bool] = True
    dropped: ClassVar[tuple[str, ...]] = ("<｜end▁of▁sentence｜>",)

    def detect(self, chat_template: str) -> bool:
        return _BEGIN_ALL in chat_template

    def parser(self, functions: Functions, prompt: str = "") -> Parser:
        def read(reader: Reader) -> Generator[Found | None, None, None]:
            yield from reader.spaces()
            yield from reader.expect(_BEGIN)
            while True:
                yield (yield from _call(reader))
                yield from reader.spaces()
                if (yield from reader.literal(_END_ALL)) or not (yield from reader.peek()):
                    return
                yield from reader.expect(_BEGIN)

        def _call(reader: Reader) -> Generator[None, None, Found]:
            name = yield from reader.take(_NAME)
            yield from reader.expect(_SEP)
            if (yield from reader.peek()) == "{":
                text = yield from reader.json()
            else:
                name = yield from reader.take(_NAME)
                yield from reader.expect("\n```json\n")
                text = yield from reader.json()
                yield from reader.spaces()
                yield from reader.expect("```")
            if not (yield from reader.literal(_END)) and (yield from reader.peek()):
                raise Malformed
            return checked_call(name, text, functions)

        return StreamParser(calls_in_content(_BEGIN_ALL, read), self.new_id)

    def calls_grammar(self, functions: Functions, parallel: bool, added_id: AddedId) -> str:
        begin_all, end_all, begin, sep, end = (
            lark_marker(text, added_id) for text in (_BEGIN_ALL, _END_ALL, _BEGIN, _SEP, _END)
        )
        fence, fence_json = lark_text("\n```"), "\n```json\n"
        both_forms = " | ".join(
            f'{lark_text(name)} {sep} args_{i} | "function" {sep} {lark_text(name + fence_json)} args_{i} {fence}'
            for i, name in enumerate(functions)
        )
        more = r' ("\n"? call)*' if parallel else ""
        return f"calls: {begin_all} call{more} {end_all}\ncall: {begin} ({both_forms}) {end}\n"


DIALECT = DeepSeek()
