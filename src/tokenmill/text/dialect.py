"""How a model writes its thoughts and its tool calls, and which of the ways a model uses.

A file in ``text/parsers/`` is one dialect. A server picks those of its model once (`choose`), and makes one parser for
each completion (`Chain.parser`), which takes the text as it comes and gives typed deltas. However the text is split
into pushes, the deltas add up to the same answer.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from tokenmill.errors import ConfigError, RequestError, did_you_mean
from tokenmill.registry import Registry
from tokenmill.text.delta import (
    Call,
    Content,
    Delta,
    Functions,
    Parsed,
    Parser,
    Reasoning,
    ToolArguments,
    ToolCall,
    gather,
)
from tokenmill.text.markup import Ends

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
    "AddedId",
    "ToolArguments",
    "ToolCall",
    "choose",
    "functions_of",
    "gather",
    "lark_calls",
    "lark_json",
    "lark_marker",
    "lark_text",
]

Kind = Literal["reasoning", "tools"]

AddedId = Callable[[str], int | None]
"""The id of an added token by its text, None where the tokenizer has no such token (`Tokenizer.added_id`)."""

_WHITESPACE = r"\x20|\x0A(\x20{0,32}|\x09{0,8})"
"""Between the tokens of JSON: what compact, spaced and indented texts have."""

Tools = Sequence[Mapping[str, Any]]
"""Functions in OpenAI's format."""


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

    def calls_grammar(self, functions: Functions, parallel: bool, added_id: AddedId) -> str | None:
        """Rules of ``calls`` in llguidance's Lark: one call, or with `parallel` one and more.

        The chain also defines ``args_0``, ``args_1``, ...: the arguments of each function as JSON, in order.
        None when calls cannot be forced.
        """
        return None

    def reasoning_grammar(self, prompt: str, added_id: AddedId) -> str:
        """Rules of ``reasoning`` in llguidance's Lark: what may come before the answer."""
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

    def parser(self, tools: Tools = (), prompt: str = "") -> Parser:
        """A parser for one completion.

        Args:
            tools: the request's tools in OpenAI's format; none when the model may not call any, and then what looks
                like a call is content.
            prompt: the text before the completion, or its end.
        """
        functions = functions_of(tools)
        stages = [d.parser(functions, prompt) for d in self.dialects if functions or "reasoning" in d.kinds]
        return _Pipeline(tuple(text for dialect in self.dialects for text in dialect.dropped), stages)

    def split(self, text: str, tools: Tools = (), prompt: str = "") -> Parsed:
        """Reads a whole completion; arguments are those of `parser`."""
        parser = self.parser(tools, prompt)
        return gather([*parser.push(text), *parser.finish()])

    def grammar(self, tools: Tools, choice: Any, parallel: bool, added_id: AddedId, prompt: str = "") -> str | None:
        """A grammar in llguidance's Lark that makes the model call a function, after its thoughts.

        Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md

        Args:
            tools: the request's tools in OpenAI's format.
            choice: OpenAI's ``tool_choice``: ``"none"``, ``"auto"``, ``"required"``, or an object naming a function.
            parallel: whether there may be several calls.
            added_id: the tokenizer's.
            prompt: the text before the completion, or its end.

        Returns:
            None when nothing is to be forced (``"none"``, ``"auto"``).

        Raises:
            RequestError: ``unknown_tool`` when `choice` names no tool, or there is none; ``unsupported_tool_choice``
                when the model's calls cannot be forced.
        """
        if choice in (None, "none", "auto"):
            return None
        functions = functions_of(tools)
        if choice != "required":
            name = choice["function"]["name"]
            if name not in functions:
                raise RequestError(
                    "unknown_tool",
                    f"tool_choice names {name!r}, which is not among the tools. {did_you_mean(name, functions)}",
                    "tool_choice",
                )
            functions, parallel = {name: functions[name]}, False
        if not functions:
            raise RequestError("unknown_tool", "tool_choice asks for a call, but there are no tools.", "tool_choice")
        for dialect in self.dialects:
            if "tools" in dialect.kinds and (calls := dialect.calls_grammar(functions, parallel, added_id)):
                return f"start: reasoning calls\n{self.reasoning_grammar(prompt, added_id)}{calls}{_args(functions)}"
        raise RequestError(
            "unsupported_tool_choice",
            "This model's tool calls cannot be forced; ask with tool_choice 'auto'.",
            "tool_choice",
        )

    def reasoning_grammar(self, prompt: str, added_id: AddedId) -> str:
        """Rules of ``reasoning`` in llguidance's Lark, which any grammar of an answer begins with."""
        for dialect in self.dialects:
            if "reasoning" in dialect.kinds:
                return dialect.reasoning_grammar(prompt, added_id)
        return 'reasoning: ""\n'


def choose(chat_template: str | None, tool_parser: str = "auto", reasoning_parser: str = "auto") -> Chain:
    """The dialects of a model: by name, ``"none"``, or ``"auto"`` for what its chat template shows.

    Raises:
        ConfigError: ``unknown_choice`` for a name that does not exist; ``wrong_parser`` for one of the other kind.
    """
    reasoning = _choose("reasoning", reasoning_parser, chat_template or "")
    tools = _choose("tools", tool_parser, chat_template or "")
    return Chain(tuple(dict.fromkeys((*reasoning, *tools))))


def functions_of(tools: Iterable[Mapping[str, Any]]) -> Functions:
    """Functions by name, of tools in OpenAI's format; tools of other types are left out."""
    functions = [tool["function"] for tool in tools if "function" in tool]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def lark_text(text: str) -> str:
    """`text` as a string of Lark."""
    return json.dumps(text, ensure_ascii=False)


def lark_marker(text: str, added_id: AddedId) -> str:
    """`text` in Lark: the token where it was added as one, which no grammar of characters reaches, else the text."""
    token_id = added_id(text)
    return lark_text(text) if token_id is None else f"<[{token_id}]>"


def lark_calls(functions: Functions, head: Callable[[str], str]) -> str:
    """The alternatives of a call in Lark: `head`, which gets the function's name, and the arguments."""
    return " | ".join(f"{lark_text(head(name))} args_{index}" for index, name in enumerate(functions))


def _choose(kind: Kind, name: str, chat_template: str) -> list[Dialect]:
    if name == "none":
        return []
    if name == "auto":
        known = [dialect for each in PARSERS.names() if kind in (dialect := PARSERS.get(each)).kinds]
        return [dialect for dialect in known if dialect.detect(chat_template)][:1]
    dialect = PARSERS.get(name)
    if kind not in dialect.kinds:
        raise ConfigError("wrong_parser", f"The parser {name!r} does not read {kind}.", f"{kind}_parser")
    return [dialect]


def lark_json(schema: Mapping[str, Any]) -> str:
    """JSON of a schema in Lark, without white space that a model could go on with for ever."""
    return "%json " + json.dumps({"x-guidance": {"whitespace_pattern": _WHITESPACE}, **schema}, ensure_ascii=False)


def _args(functions: Functions) -> str:
    """Each function's arguments are a JSON document of their own, so that references inside its schema hold."""
    schemas = [{"type": "object", **schema} for schema in functions.values()]
    return "".join(f"args_{i}: {lark_json(schema)}\n" for i, schema in enumerate(schemas))


class _Pipeline:
    """Parsers one after the other; the first gets the text without what is to be dropped."""

    def __init__(self, dropped: tuple[str, ...], stages: Sequence[Parser]) -> None:
        self._dropped = Ends(dropped)
        self._stages = stages
        self._held = ""

    def push(self, text: str) -> list[Delta]:
        text, self._held = self._dropped.remove(self._held + text)
        return self._flow(text, 0)

    def finish(self) -> list[Delta]:
        deltas = self._flow(self._held, 0)
        for index, stage in enumerate(self._stages):
            deltas += self._onward(stage.finish(), index + 1)
        self._held = ""
        return deltas

    def _flow(self, text: str, first: int) -> list[Delta]:
        """What comes of `text` when the stage `first` gets it."""
        if not text:
            return []
        if first == len(self._stages):
            return [Content(text)]
        return self._onward(self._stages[first].push(text), first + 1)

    def _onward(self, deltas: list[Delta], stage: int) -> list[Delta]:
        if stage == len(self._stages):
            return deltas
        onward: list[Delta] = []
        for delta in deltas:
            onward += self._flow(delta.text, stage) if isinstance(delta, Content) else [delta]
        return onward
