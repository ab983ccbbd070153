"""Messages to a prompt, by the model's chat template: Jinja with the semantics that Hugging Face templates rely on.

Source: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tokenmill.errors import RequestError
from tokenmill.text.tokenizer import Tokenizer

__all__ = ["encode_chat", "render"]

Message = Mapping[str, Any]


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **template_variables: Any,
) -> str:
    """The prompt for `messages` (OpenAI's format), special tokens included.

    Content made of text parts becomes one text, joined by newlines; arguments of tool calls become objects, as
    templates expect them, that can also be joined to a text, as some do; reasoning gets every name that templates give
    it; fields that are null are as good as absent.

    Args:
        tools: descriptions of functions in OpenAI's format, for templates that show them to the model.
        add_generation_prompt: end with the opening of the assistant's answer.
        template_variables: what else the template reads, for example ``enable_thinking``.

    Raises:
        RequestError: ``no_chat_template``; ``unsupported_content`` for parts that are no text; ``chat_template_failed``
            when the template refuses the messages or breaks on them.
    """
    if not tokenizer.chat_template:
        raise RequestError(
            "no_chat_template", "The model has no chat template, so it takes only plain prompts.", "messages"
        )
    no_content = None if _KNOWS_NO_CONTENT.search(tokenizer.chat_template) else ""
    variables = {
        **tokenizer.special_tokens,
        **template_variables,
        "messages": [_plain(message, index, no_content) for index, message in enumerate(messages)],
        "tools": list(tools) if tools else None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return _compile(tokenizer.chat_template).render(variables)
    except Exception as error:  # a template is a program: it can fail in any way on messages it was not written for
        raise RequestError(
            "chat_template_failed",
            f"The chat template cannot take these messages: {str(error).rstrip('.')}.",
            "messages",
        ) from error


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **template_variables: Any,
) -> list[int]:
    """Token ids of the prompt that `render` makes; arguments and errors are its own.

    The template writes the special tokens, so the tokenizer adds none.
    """
    prompt = render(tokenizer, messages, tools, add_generation_prompt, **template_variables)
    return tokenizer.encode(prompt, add_special_tokens=False)


_KNOWS_NO_CONTENT = re.compile(r"content\W{0,2}\s+is\s+(not\s+)?none")
"""Found in templates that tell a call without content by null (DeepSeek's); others fail on null or don't look."""


class _Arguments(dict[str, Any]):
    """A call's arguments: an object to most templates, JSON text where one joins it to a text, as DeepSeek's do."""

    def __str__(self) -> str:
        return _tojson(self)

    def __add__(self, text: str) -> str:
        return str(self) + text

    def __radd__(self, text: str) -> str:
        return text + str(self)


def _plain(message: Message, index: int, no_content: str | None) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if value is not None}
    calls = plain.pop("tool_calls", ())
    if calls:
        plain["tool_calls"] = [_with_arguments(call) for call in calls]
    content = message.get("content")
    plain["content"] = no_content if calls and content is None else _text(content, f"messages[{index}].content")
    if thoughts := plain.get("reasoning_content") or plain.get("reasoning"):
        plain["reasoning_content"] = thoughts
        if not plain["content"]:  # gpt-oss's template refuses both
            plain.setdefault("thinking", thoughts)
    return plain


def _text(content: Any, field: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError("unsupported_content", f"{field} must be a text or a list of parts.", field)
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RequestError(
                "unsupported_content",
                f'{field}[{index}] must be {{"type": "text", "text": ...}}; this model takes text only.',
                f"{field}[{index}]",
            )
        texts.append(text)
    return "\n".join(texts)


def _with_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object. Arguments that are not JSON (models err) stay the text they are."""
    try:
        function = call["function"]
        arguments = function["arguments"]
        parsed = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (TypeError, KeyError, ValueError):
        return call
    if isinstance(parsed, Mapping):
        parsed = _Arguments(parsed)
    return {**call, "function": {**function, "arguments": parsed}}


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's words for training; its content stays."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters and sorts keys, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
