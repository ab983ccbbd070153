"""The items of a Responses conversation: checked, given ids, and turned into messages for a chat template.

Source: https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.errors import RequestError
from tokenmill.types import JSON

__all__ = ["item_text", "messages_of", "new_id", "normalized"]

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "compaction": "cmp",
}
"""The types of items that are understood, and what their ids begin with."""

_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text")


def new_id(kind: str) -> str:
    """A name for an item of a type."""
    return f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"


def normalized(given: str | Sequence[Mapping[str, Any]], field: str = "input") -> list[JSON]:
    """Items in their long form, each with a type and an id.

    Raises:
        RequestError: ``invalid_parameter`` or ``unsupported_parameter``, with the field inside the item.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_normalized(item, f"{field}[{index}]") for index, item in enumerate(given)]


def messages_of(items: Sequence[JSON], instructions: str | None = None, field: str = "input") -> list[JSON]:
    """The conversation as messages in the form of chat completions.

    What stands first of instructions, system and developer messages becomes one system message, since many templates
    take no second one. Thoughts, text and calls that follow each other become one message of the assistant.

    Raises:
        RequestError: ``invalid_parameter`` about a function's output without its call.
    """
    messages: list[JSON] = [] if instructions is None else [{"role": "system", "content": instructions}]
    names: dict[str, str] = {}
    for index, item in enumerate(items):
        match item["type"]:
            case "message" if item["role"] in ("system", "developer"):
                _append_text(messages, "system", item_text(item), merge=len(messages) == 1)
            case "message" if item["role"] == "user":
                messages.append({"role": "user", "content": item_text(item)})
            case "message":
                _append_text(messages, "assistant", item_text(item), merge=True)
            case "compaction":
                role = "system" if all(message["role"] == "system" for message in messages) else "assistant"
                _append_text(messages, role, item_text(item), merge=True)
            case "reasoning":
                messages.append({"role": "assistant", "content": "", "reasoning_content": item_text(item)})
            case "function_call":
                names[item["call_id"]] = item["name"]
                _append_call(messages, item)
            case _:
                call_id = item["call_id"]
                if call_id not in names:
                    raise RequestError(
                        "invalid_parameter",
                        f"There is no function_call with call_id {call_id!r} before this output.",
                        f"{field}[{index}].call_id",
                    )
                output = {"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": item_text(item)}
                messages.append(output)
    return [message for message in messages if message != {"role": "assistant", "content": "", "reasoning_content": ""}]


def item_text(item: Mapping[str, Any]) -> str:
    """What a normalized item says."""
    match item["type"]:
        case "function_call":
            return str(item["arguments"])
        case "compaction":
            return str(item["encrypted_content"])
        case "function_call_output":
            output = item["output"]
            return output if isinstance(output, str) else _joined(output)
        case _:
            return _joined(item.get("content") or ())


def _append_text(messages: list[JSON], role: str, text: str, *, merge: bool) -> None:
    last = messages[-1] if messages else None
    if merge and last is not None and last["role"] == role and "tool_calls" not in last:
        last["content"] = f"{last['content']}\n\n{text}" if last["content"] else text
    else:
        messages.append({"role": role, "content": text})


def _append_call(messages: list[JSON], item: JSON) -> None:
    call = {
        "id": item["call_id"],
        "type": "function",
        "function": {"name": item["name"], "arguments": item["arguments"]},
    }
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})


def _joined(parts: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in parts)


def _normalized(item: Mapping[str, Any], field: str) -> JSON:
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind not in _PREFIXES:
        raise RequestError(
            "unsupported_parameter",
            f"{field}.type must be one of {', '.join(_PREFIXES)}; got {kind!r}.",
            f"{field}.type",
        )
    checked: JSON = {name: value for name, value in item.items() if value is not None} | {"type": kind}
    if not isinstance(checked.setdefault("id", new_id(kind)), str):
        raise _wrong(f"{field}.id", "a text")
    if kind == "message":
        if checked.get("role") not in _ROLES:
            raise _wrong(f"{field}.role", f"one of {', '.join(_ROLES)}")
        part = "output_text" if checked["role"] == "assistant" else "input_text"
        checked["content"] = _parts(checked.get("content"), f"{field}.content", part)
        checked.setdefault("status", "completed")
    elif kind == "reasoning":
        checked["content"] = _reasoning_parts(checked.get("content", []), f"{field}.content")
        checked.setdefault("summary", [])
    else:
        needed = {
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id",),
            "compaction": ("encrypted_content",),
        }[kind]
        for name in needed:
            if not isinstance(checked.get(name), str):
                raise _wrong(f"{field}.{name}", "a text")
        if kind == "function_call_output" and not isinstance(checked.get("output"), str):
            checked["output"] = _parts(checked.get("output"), f"{field}.output", "input_text")
        if kind != "compaction":
            checked.setdefault("status", "completed")
    return checked


def _parts(content: Any, field: str, kind: str) -> list[JSON]:
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    if not isinstance(content, list):
        raise _wrong(field, "a text or a list of parts")
    for index, part in enumerate(content):
        where = f"{field}[{index}]"
        if not isinstance(part, dict):
            raise _wrong(where, "an object")
        if part.get("type") not in (*_TEXT_PARTS, "refusal"):
            raise RequestError(
                "unsupported_parameter",
                f"{where}.type must be input_text, output_text or refusal; this model takes text only.",
                f"{where}.type",
            )
        name = "refusal" if part["type"] == "refusal" else "text"
        if not isinstance(part.get(name), str):
            raise _wrong(f"{where}.{name}", "a text")
    return [dict(part) for part in content]


def _reasoning_parts(content: Any, field: str) -> list[JSON]:
    if not isinstance(content, list):
        raise _wrong(field, "a list of parts")
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise _wrong(f"{field}[{index}].text", "a text")
    return [{"type": "reasoning_text", "text": part["text"]} for part in content]


def _wrong(field: str, rule: str) -> RequestError:
    return RequestError("invalid_parameter", f"{field} must be {rule}.", field)
