"""How a model writes its thoughts and its tool calls, and the parsers that read them back from its text.

A file in ``text/parsers/`` is one dialect. A server picks those of its model once (`choose`), and makes one parser for
each completion (`Chain.parser`), which takes the text as it comes and gives typed deltas. However the text is split
into pushes, the deltas add up to the same answer.
"""

from __future__ import annotations

import dataclasses
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import msgspec

from tokenmill.errors import RequestError, did_you_mean
from tokenmill.registry import Registry

__all__ = [
    "PARSERS",
    "Call",
    "Chain",
    "Content",
    "Delta",
    "Dialect",
    "Functions",
    "Kind",
    "Parsed",
    "Parser",
    "Reasoning",
    "Spell",
    "ToolArguments",
    "ToolCall",
    "choose",
    "functions",
    "gather",
]

Kind = Literal["reasoning", "tools"]

Functions = Mapping[str, Mapping[str, Any]]
"""The functions that a model may call: name to JSON schema of the parameters."""

Spell = Callable[[str], str]
"""Writes a marker in Lark: as a token where the tokenizer has it as a special one, else as a text."""


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


class Dialect(ABC):
    """One way of writing thoughts, tool calls or both. Stateless."""

    kinds: ClassVar[frozenset[Kind]]
    keeps_special_tokens: ClassVar[bool] = False
    """Whether its markers are special tokens, so that the text must be decoded with ``skip_special_tokens=False``."""
    dropped: ClassVar[tuple[str, ...]] = ()
    """Special tokens that are then in the text and mean nothing, for example the end of the turn."""

    @abstractmethod
    def detect(self, chat_template: str) -> bool:
        """Whether a model with this chat template speaks the dialect."""

    @abstractmethod
    def parser(self, functions: Functions, prompt: str = "") -> Parser:
        """A parser for one completion.

        Args:
            functions: those that may be called; a call of any other is content.
            prompt: the text before the completion, or its end: a template may have opened the thoughts already.
        """

    def calls_grammar(self, functions: Functions, parallel: bool, spell: Spell) -> str | None:
        """Lark rules of ``calls``: one call of one of `functions`, or one and more. None when they cannot be forced."""
        return None

    def reasoning_grammar(self, prompt: str, spell: Spell) -> str:
        """Lark rules of ``reasoning``: what may come before the answer."""
        return 'reasoning: ""\n'

    def new_id(self) -> str:
        """Name for a call."""
        return f"call_{secrets.token_hex(12)}"


PARSERS: Registry[Dialect] = Registry("tokenmill.text.parsers", "parsers", "DIALECT")


@dataclasses.dataclass(frozen=True)
class Chain:
    """The dialects of one model, in the order in which they read: each gets the content that the one before left."""

    dialects: tuple[Dialect, ...] = ()

    @property
    def keeps_special_tokens(self) -> bool:
        """Whether the text must be decoded with ``skip_special_tokens=False``."""
        return any(dialect.keeps_special_tokens for dialect in self.dialects)

    def parser(self, tools: Sequence[Mapping[str, Any]] = (), prompt: str = "") -> Parser:
        """A parser for one completion.

        Args:
            tools: the request's tools in OpenAI's format; none when it may not call any.
            prompt: the text before the completion, or its end.
        """
        raise RuntimeError

    def split(self, text: str, tools: Sequence[Mapping[str, Any]] = (), prompt: str = "") -> Parsed:
        """Reads a whole completion; arguments are those of `parser`."""
        parser = self.parser(tools, prompt)
        return gather([*parser.push(text), *parser.finish()])

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: Any,
        parallel: bool,
        special_id: Callable[[str], int | None],
        prompt: str = "",
    ) -> str | None:
        """A grammar in llguidance's Lark that makes the model call a function, after its thoughts.

        Args:
            tools: the request's tools in OpenAI's format.
            choice: OpenAI's ``tool_choice``: ``"none"``, ``"auto"``, ``"required"``, or an object that names a function.
            parallel: whether there may be several calls.
            special_id: the id of a special token by its text, None where the tokenizer has none
                (`Tokenizer.special_id`).
            prompt: the text before the completion, or its end.

        Returns:
            None when nothing is to be forced (``"none"``, ``"auto"``).

        Raises:
            RequestError: ``unknown_tool`` when `choice` names no tool; ``unsupported_tool_choice`` when no dialect of
                the model can be forced.
        """
        raise RuntimeError


def choose(chat_template: str | None, tool_parser: str = "auto", reasoning_parser: str = "auto") -> Chain:
    """The dialects of a model: by name, ``"none"``, or ``"auto"`` for what its chat template shows.

    Raises:
        ConfigError: ``unknown_choice`` for a name that does not exist; ``wrong_parser`` for one of the other kind.
    """
    raise RuntimeError


def functions(tools: Iterable[Mapping[str, Any]]) -> Functions:
    """Functions by name, of tools in OpenAI's format. A function without parameters takes an empty object."""
    return {
        tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object", "properties": {}}
        for tool in tools
    }


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
        tuple(
            Call(call.id, call.name, "".join(pieces)) for call, pieces in zip(calls, arguments, strict=True)
        ),
    )
