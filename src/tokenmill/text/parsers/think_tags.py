"""Reasoning between ``<think>`` and ``</think>`` at the beginning of the answer: DeepSeek R1, Qwen3, QwQ and many more.

The opening tag is often the end of the prompt already, written by the chat template; then the text begins with
reasoning. Tags further on are content: an answer may speak of them.

Sources: https://huggingface.co/deepseek-ai/DeepSeek-R1#usage-recommendations and
https://huggingface.co/Qwen/Qwen3-8B#switching-between-thinking-and-non-thinking-mode
"""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

from tokenmill.text.dialect import (
    AddedId,
    Content,
    Delta,
    Dialect,
    Functions,
    Kind,
    Parser,
    Reasoning,
    lark_marker,
    lark_text,
)
from tokenmill.text.markup import Ends, Found, Reader, StreamParser

_OPEN, _CLOSE = "<think>", "</think>"
_CLOSES = Ends([_CLOSE])


class ThinkTags(Dialect):
    kinds: ClassVar[frozenset[Kind]] = frozenset({"reasoning"})

    def detect(self, chat_template: str) -> bool:
        return _OPEN in chat_template or _CLOSE in chat_template

    def parser(self, functions: Functions, prompt: str = "") -> Parser:
        is_open = _opened(prompt)

        def read(reader: Reader) -> Generator[Delta | Found | None, None, None]:
            yield from reader.spaces()
            if not (yield from reader.literal(_OPEN)) and not is_open:
                if before := "".join(reader.passed):
                    yield Content(before)
                return
            yield from reader.spaces()
            end = ""
            while not end:
                text, end = yield from reader.until(_CLOSES)
                if not text and not end:
                    return
                if text:
                    yield Reasoning(text)
            yield from reader.spaces()

        return StreamParser(read, self.new_id)

    def reasoning_grammar(self, prompt: str, added_id: AddedId) -> str:
        close = added_id(_CLOSE)
        thought = "thought[lazy]: /(.|\\n)*<\\/think>/\n" if close is None else f"thought: /(.|\\n)*/ <[{close}]>\n"
        opening = "" if _opened(prompt) else lark_marker(_OPEN, added_id)
        optional = "" if _opened(prompt) else "?"
        return f"reasoning: ({opening} thought {lark_text(chr(10))}~0..2){optional}\n{thought}"


def _opened(prompt: str) -> bool:
    return prompt.rstrip().endswith(_OPEN)


DIALECT = ThinkTags()
