"""Why a conversation no longer begins as it did, so that the prefix cache could not serve it.

Two requests are compared as the model sees them, token by token. What made the first difference is found by experiment:
each part that changed is put back as it was, and the one that moves the difference furthest is the cause. So the answer
holds for any chat template.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from tokenmill.text.chat import render
from tokenmill.text.tokenizer import Tokenizer

__all__ = ["Cause", "Conversation", "Drift", "compare", "common_length", "volatile"]

Cause = Literal[
    "none",  # the later request begins with all of the earlier one
    "variables",  # other template variables
    "tools_reordered",
    "tools_added",
    "tools_removed",
    "tools_changed",
    "message_dropped",  # from the history, as a window over it does
    "message_inserted",
    "message_whitespace",  # differs in white space only
    "message_volatile",  # differs in a time, a date or a random id only
    "message_changed",
    "template",  # the chat template itself writes something else, as a date
    "prompt",  # plain prompts, of which no parts are known
]

_VOLATILE = re.compile(
    r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?"  # 2026-11-25T01:02:03Z
    r"|\b\d\d?:\d\d(?::\d\d)?(?:\s?[AaPp][Mm])?\b"  # 1:02 pm
    r"|\b[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}\b"  # a UUID
    r"|\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b"
    r"|\b(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]* \d\d?(?:, \d{4})?\b"
    r"|\b1[5-9]\d{8}(?:\d{3})?\b"  # seconds or milliseconds since 1970
    r"|\b[0-9a-f]{24,}\b"
)
"""Texts that are another at each request."""

_SHOWN = 40
"""Characters of context to show on either side of a difference."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a chat template makes a prompt of."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def text(self, tokenizer: Tokenizer) -> str:
        """The prompt, without the opening of an answer."""
        return render(tokenizer, self.messages, self.tools, add_generation_prompt=False, **self.variables)


@dataclasses.dataclass(frozen=True)
class Drift:
    """How a later request differs from an earlier one of the same conversation."""

    shared_tokens: int
    """Tokens that both begin with."""
    lost_tokens: int
    """Tokens of the earlier one that the cache can no longer serve."""
    cause: Cause
    detail: str
    """The cause in words; holds names of tools and places, no other text of the prompts."""
    before: str = ""
    after: str = ""
    """The texts around the first difference."""

    def __str__(self) -> str:
        if self.cause == "none":
            return f"begins as the previous request of this conversation did, for {self.shared_tokens} tokens"
        return f"differs from the previous request of this conversation at token {self.shared_tokens}: {self.detail}"


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with. Compares slices, so that a long prefix costs little."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def compare(
    tokenizer: Tokenizer,
    before: Conversation | None,
    before_ids: Sequence[int],
    after: Conversation | None,
    after_ids: Sequence[int],
) -> Drift:
    """What became of the beginning of a conversation.

    Args:
        before: the earlier request; None when it was a plain prompt.
        before_ids: its prompt.
        after: the later request.
        after_ids: its prompt; a sequence of the same type as `before_ids`.
    """
    shared = common_length(before_ids, after_ids)
    lost = len(before_ids) - shared
    texts = _texts(tokenizer, shared, before_ids, after_ids)
    if lost == 0:
        return Drift(shared, 0, "none", "nothing changed")
    if before is None or after is None:
        return Drift(shared, lost, "prompt", "the prompt changed", *texts)
    settled = tokenizer.encode(before.text(tokenizer), add_special_tokens=False)
    if shared >= common_length(settled, list(before_ids)):
        # Only the opening of the answer, which a template may write otherwise once the answer is there.
        return Drift(shared, lost, "none", "nothing changed")
    cause, detail = _cause(tokenizer, before, after)
    return Drift(shared, lost, cause, detail, *texts)


def _texts(tokenizer: Tokenizer, shared: int, *sequences: Sequence[int]) -> Iterator[str]:
    for ids in sequences:
        near = list(ids[max(0, shared - 8) : shared + 12])
        text = tokenizer.decode(near, skip_special_tokens=False)
        yield text[: 2 * _SHOWN]


def _cause(tokenizer: Tokenizer, before: Conversation, after: Conversation) -> tuple[Cause, str]:
    """The change that, undone, lets the two agree for longest."""
    was = before.text(tokenizer)
    reach = _reach(was, after.text(tokenizer))
    best: tuple[int, Callable[[], tuple[Cause, str]]] | None = None
    for changed, describe in _changes(before, after):
        undone = _reach(was, changed.text(tokenizer))
        if undone > reach and (best is None or undone > best[0]):
            best = undone, describe
    return ("template", "the chat template wrote something else") if best is None else best[1]()


def _reach(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _changes(
    before: Conversation, after: Conversation
) -> Iterator[tuple[Conversation, Callable[[], tuple[Cause, str]]]]:
    """The later request with one part as it was, for every part that changed first."""
    if before.variables != after.variables:
        names = sorted(
            name
            for name in before.variables.keys() | after.variables.keys()
            if before.variables.get(name) != after.variables.get(name)
        )
        detail = f"template variables changed: {', '.join(names)}"
        yield dataclasses.replace(after, variables=before.variables), lambda: ("variables", detail)
    if _exact(before.tools) != _exact(after.tools):
        yield dataclasses.replace(after, tools=before.tools), lambda: _tools(before.tools, after.tools)
    pairs = itertools.zip_longest(before.messages, after.messages)
    index = next((i for i, (old, new) in enumerate(pairs) if _exact(old) != _exact(new)), None)
    if index is not None and index < len(before.messages):
        kept = [*after.messages[:index], *before.messages[index:]]
        found = index
        yield dataclasses.replace(after, messages=kept), lambda: _message(before.messages, after.messages, found)


def _exact(value: Any) -> str:
    """As a template writes it: the order of keys counts."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", "?"))


def _tools(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> tuple[Cause, str]:
    old, new = {_name(tool): tool for tool in before}, {_name(tool): tool for tool in after}
    if added := [name for name in new if name not in old]:
        return "tools_added", f"tools added: {', '.join(added)}"
    if removed := [name for name in old if name not in new]:
        return "tools_removed", f"tools removed: {', '.join(removed)}"
    if changed := [name for name in new if _exact(new[name]) != _exact(old[name])]:
        only_order = all(new[name] == old[name] for name in changed)
        what = "keys reordered in" if only_order else "tools changed:"
        return "tools_changed", f"{what} {', '.join(changed)}"
    return "tools_reordered", "tools reordered"


def _message(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], index: int) -> tuple[Cause, str]:
    old = before[index]
    where = f"messages[{index}] ({old.get('role')})"
    if index >= len(after):
        return "message_dropped", f"{where} and what follows it dropped"
    new = after[index]
    rest = [_exact(message) for message in before[index + 1 :]]
    if _exact(new) in rest:
        count = rest.index(_exact(new)) + 1
        return "message_dropped", f"{count} message{'s' if count > 1 else ''} dropped at {where}"
    if _exact(old) in [_exact(message) for message in after[index + 1 :]]:
        return "message_inserted", f"a message inserted before {where}"
    then, now = _exact(old), _exact(new)
    if re.sub(r"\s|\\[nrt]", "", then) == re.sub(r"\s|\\[nrt]", "", now):
        return "message_whitespace", f"{where} differs in white space only"
    if _VOLATILE.sub("", then) == _VOLATILE.sub("", now):
        return "message_volatile", f"{where} holds a time or an id that is another at each request"
    fields = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return "message_changed", f"{where} changed in {', '.join(fields) or 'the order of its keys'}"


def volatile(conversation: Conversation) -> list[tuple[str, str]]:
    """Places of one request that will be others in the next: (place, text)."""
    places = [
        (f"messages[{index}] ({message['role']})", str(message.get("content")))
        for index, message in enumerate(conversation.messages)
        if message.get("role") in ("system", "developer")
    ]
    places += [(f"tool {_name(tool)}", _exact(tool)) for tool in conversation.tools]
    return [(place, match.group()) for place, text in places for match in _VOLATILE.finditer(text)]
