"""Harmony of gpt-oss: messages with a header that names a channel and, for a call, the function it goes to.

``analysis`` is reasoning, ``final`` and what ``commentary`` says to nobody are content, and a message to
``functions.<name>`` is a call. Messages to others, such as built-in tools, are content as they stand::

    <|channel|>analysis<|message|>I should look it up.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>

(without the line break). The prompt ends with ``<|start|>assistant``, or inside a message that is to be continued.

Source: https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import ClassVar, NamedTuple

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
from tokenmill.text.markup import Ends, Found, Malformed, Read, Reader, StreamParser, all_of, checked_call

_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_CONSTRAIN, _CALL = "<|constrain|>", "<|call|>"
_ENDS = Ends([_END, "<|return|>", _CALL, _START])
_STARTS = Ends([_START, _CHANNEL])
_WORD = re.compile(r"\w+")
_NAME = re.compile(r"[\w.\-]+")
_TO = "functions."


class _Header(NamedTuple):
    channel: str
    recipient: str


class Harmony(Dialect):
    kinds: ClassVar[frozenset[Kind]] = frozenset({"reasoning", "tools"})
    keeps_special_tokens: ClassVar[bool] = True

    def detect(self, chat_template: str) -> bool:
        return _CHANNEL in chat_template

    def parser(self, functions: Functions, prompt: str = "") -> Parser:
        continued = _continued(prompt)

        def read(reader: Reader) -> Generator[Delta | Found | None, None, None]:
            header, marker = continued, ""
            while header or marker or (yield from reader.peek()):
                try:
                    header = header or (yield from _header(reader, marker))
                    marker = yield from _message(reader, header, functions)
                except Malformed:
                    if raw := "".join(reader.passed):
                        yield Content(raw)
                    marker = yield from _flow(reader, _STARTS, Content)
                header = None
                reader.passed[:] = [marker] if marker else []

        return StreamParser(read, self.new_id)

    def calls_grammar(self, functions: Functions, parallel: bool, added_id: AddedId) -> str:
        # The models make one call and then stop for its result.
        channel, constrain, message = (lark_marker(text, added_id) for text in (_CHANNEL, _CONSTRAIN, _MESSAGE))
        calls = " | ".join(f"{lark_text(f'{name} ')} json args_{i}" for i, name in enumerate(functions))
        return f'calls: {channel} "commentary to={_TO}" ({calls})\njson: {constrain} "json" {message}\n'

    def reasoning_grammar(self, prompt: str, added_id: AddedId) -> str:
        channel, message, end, start = (lark_marker(text, added_id) for text in (_CHANNEL, _MESSAGE, _END, _START))
        return f'reasoning: ({channel} "analysis" {message} /(.|\\n)*/ {end} {start} "assistant")?\n'


def _header(reader: Reader, marker: str) -> Read[_Header]:
    """What stands before a message. `marker` is what of it was read already: nothing, its start, or up to its channel.

    Raises:
        Malformed: it is no header of the assistant.
    """
    if not marker:
        yield from reader.literal(_START)
    yield from reader.literal("assistant")
    channel = (yield from reader.take(_WORD)) if marker == _CHANNEL else ""
    recipient = ""
    while not (yield from reader.literal(_MESSAGE)):
        if (yield from reader.spaces()):
            continue
        if (yield from reader.literal("to=")):
            recipient = yield from reader.take(_NAME)
        elif (yield from reader.literal(_CHANNEL)):
            channel = yield from reader.take(_WORD)
        elif channel and (yield from reader.literal(_CONSTRAIN)):
            continue
        elif not channel or not (yield from reader.take(_WORD)):  # the type of the content
            raise Malformed
    return _Header(channel, recipient)


def _message(reader: Reader, header: _Header, functions: Functions) -> Generator[Delta | Found | None, None, str]:
    """The message after a header; returns the start of the next one if that was read.

    Raises:
        Malformed: it is for somebody unknown.
    """
    if not header.recipient:
        return (yield from _flow(reader, _ENDS, Reasoning if header.channel == "analysis" else Content))
    name = header.recipient.removeprefix(_TO)
    if name == header.recipient or name not in functions:
        raise Malformed
    arguments: list[str] = []
    end = ""
    while not end:
        text, end = yield from reader.until(_ENDS)
        if not text and not end:
            break
        arguments.append(text)
    try:
        yield checked_call(name, "".join(arguments).strip(), functions)
    except Malformed:
        yield Content("".join(reader.passed).removesuffix(_START))
    return end if end == _START else ""


def _flow(
    reader: Reader, ends: Ends, kind: type[Content] | type[Reasoning]
) -> Generator[Delta | Found | None, None, str]:
    """Text up to one of `ends` as it comes; returns that end if another message starts with it."""
    while True:
        text, end = yield from reader.until(ends)
        if text:
            yield kind(text)
        if end or not text:
            return end if end in (_START, _CHANNEL) else ""


def _continued(prompt: str) -> _Header | None:
    """The header of the message that the prompt leaves open, if it does."""
    header, message, text = prompt.rpartition(_START)[2].partition(_MESSAGE)
    if not message or _ENDS.search(text):
        return None
    reader = Reader()
    reader.feed(header + message)
    reader.close()
    try:
        return all_of(_header(reader, _START))
    except Malformed:
        return None


DIALECT = Harmony()
