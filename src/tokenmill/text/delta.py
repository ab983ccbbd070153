"""What a completion turns out to hold, piece by piece: content, reasoning, and tool calls.

Whatever the model's dialect, its parser gives these; the server writes them in the format of whoever asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import msgspec

__all__ = [
    "Call",
    "Content",
    "Delta",
    "Functions",
    "Parsed",
    "Parser",
    "Reasoning",
    "ToolArguments",
    "ToolCall",
    "gather",
]

Functions = Mapping[str, Mapping[str, Any]]
"""The functions that a model may call: name to JSON schema of the parameters."""


class Content(msgspec.Struct, frozen=True):
    """A piece of the answer proper."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """A piece of what the model thinks before it answers."""

    text: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call begins; its arguments follow."""

    index: int
    """Counts the calls of one answer from 0."""
    id: str
    """Random; a tool's result refers to it."""
    name: str


class ToolArguments(msgspec.Struct, frozen=True):
    """A piece of the JSON text of a call's arguments. All pieces of one call make an object."""

    index: int
    text: str


Delta = Content | Reasoning | ToolCall | ToolArguments


class Call(msgspec.Struct, frozen=True):
    """A whole tool call."""

    id: str
    name: str
    arguments: str
    """JSON text of an object, as the model wrote it."""


class Parsed(msgspec.Struct, frozen=True):
    """A whole answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[Call, ...] = ()


class Parser(Protocol):
    """Reads one completion. Never raises: what is no well-formed markup is content."""

    def push(self, text: str) -> list[Delta]:
        """What is certain now that `text` has come."""

    def finish(self) -> list[Delta]:
        """What was held back. No more text comes."""


def gather(deltas: Iterable[Delta]) -> Parsed:
    """The whole that `deltas` add up to."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        match delta:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCall():
                calls.append(delta)
                arguments.append([])
            case ToolArguments(index, text):
                arguments[index].append(text)
    return Parsed(
        "".join(content),
        "".join(reasoning),
        tuple(Call(call.id, call.name, "".join(pieces)) for call, pieces in zip(calls, arguments, strict=True)),
    )
