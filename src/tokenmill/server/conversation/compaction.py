"""Makes a long conversation shorter: what matters most stays word for word, the rest is shortened or summed up.

The steps, each only as far as needed: thoughts of finished turns go; old outputs of tools keep their head and tail; the
oldest steps give way to an item that tells of them. System messages, the last question and the last step stay.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from tokenmill.server.conversation.items import item_text, new_id
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import JSON

__all__ = ["Compaction", "compact", "extract", "steps_of"]

_PER_ITEM = 8
"""Tokens that a template writes around an item, about."""
_SHARE_OF_SUMMARY = 4
"""The summaries may take one part in so many of the budget."""
_FIRST_TOKENS = 48
"""Tokens that an extract takes from a message."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclasses.dataclass(eq=False)
class Step:
    """Items that stay or go together: a message, or calls with their outputs."""

    items: list[JSON]
    fixed: bool
    """Whether it must stay."""


@dataclasses.dataclass(frozen=True)
class Compaction:
    """A shorter conversation."""

    parts: list[JSON | list[JSON]]
    """Items, and where some were dropped, the list of them."""
    reasoning_items: int
    """How many thoughts were dropped."""
    shortened: list[JSON]
    """Outputs of tools that lost their middle."""
    summary_tokens: int
    """How long the summaries may be, all together."""

    @property
    def gaps(self) -> list[list[JSON]]:
        """What was dropped, run by run."""
        return [part for part in self.parts if isinstance(part, list)]

    def items(self, summaries: Sequence[str]) -> list[JSON]:
        """The conversation with a text in place of each gap."""
        texts = iter(summaries)
        return [
            {
                "id": new_id("compaction"),
                "type": "compaction",
                "encrypted_content": next(texts),
                "created_by": "tokenmill",
            }
            if isinstance(part, list)
            else part
            for part in self.parts
        ]


def steps_of(items: Sequence[JSON]) -> list[Step]:
    """A conversation in the pieces that can be dropped.

    Fixed are system and developer messages, the last message of the user, and the last step.
    """
    steps: list[Step] = []
    for item in items:
        if steps and _joins(steps[-1].items[-1], item):
            steps[-1].items.append(item)
        else:
            steps.append(Step([item], item.get("role") in ("system", "developer")))
    if steps:
        steps[-1].fixed = True
    for step in reversed(steps):
        if step.items[0].get("role") == "user":
            step.fixed = True
            break
    return steps


def _joins(last: JSON, item: JSON) -> bool:
    """Whether an item belongs to the step of the one before it."""
    before, spoken = last["type"], last.get("role") == "assistant"
    match item["type"]:
        case "function_call_output":
            return before in ("function_call", "function_call_output")
        case "function_call":
            return before in ("reasoning", "function_call") or spoken
        case _:
            return before == "reasoning" and item.get("role") == "assistant"


def compact(items: Sequence[JSON], tokenizer: Tokenizer, budget: int, tool_output_tokens: int) -> Compaction:
    """Chooses what stays.

    Args:
        budget: tokens that the conversation may have. What must stay may exceed it.
        tool_output_tokens: what is left of an output of a tool, where outputs must be shortened.
    """

    def size(some: Sequence[JSON]) -> int:
        return sum(len(tokenizer.encode(item_text(item), add_special_tokens=False)) + _PER_ITEM for item in some)

    steps = steps_of(items)
    last_question = max((i for i, step in enumerate(steps) if step.items[0].get("role") == "user"), default=0)
    reasoning = 0
    for step in steps[:last_question]:
        kept = [item for item in step.items if item["type"] != "reasoning"]
        reasoning += len(step.items) - len(kept)
        step.items = kept
    steps = [step for step in steps if step.items]
    sizes = [size(step.items) for step in steps]

    shortened: list[JSON] = []
    for step_range in (range(len(steps) - 1), range(len(steps) - 1, len(steps))):
        for index in step_range:  # the oldest first, and the last step only when nothing else helps
            if sum(sizes) > budget:
                shortened += _shorten(steps[index], tokenizer, tool_output_tokens)
                sizes[index] = size(steps[index].items)

    stays = [True] * len(steps)
    summary_tokens = 0
    if sum(sizes) > budget:
        summary_tokens = max(budget // _SHARE_OF_SUMMARY, _FIRST_TOKENS)
        left = budget - summary_tokens - sum(size for size, step in zip(sizes, steps, strict=True) if step.fixed)
        for index in range(len(steps) - 1, -1, -1):
            if not steps[index].fixed:
                left -= sizes[index]
                stays[index] = left >= 0
    parts: list[JSON | list[JSON]] = []
    for stay, group in itertools.groupby(zip(stays, steps, strict=True), key=lambda pair: pair[0]):
        run = [item for _, step in group for item in step.items]
        parts += run if stay else [run]
    return Compaction(parts, reasoning, shortened, summary_tokens)


def extract(items: Sequence[JSON], tokenizer: Tokenizer, tokens: int) -> str:
    """The beginnings of messages, and what was called with what result: as many lines as fit, the last ones first."""
    lines = [line for item in items if (line := _line(item, tokenizer))]
    head = f"[Shortened: {len(items)} earlier items.]"
    left = tokens - len(tokenizer.encode(head, add_special_tokens=False))
    chosen: list[str] = []
    for line in reversed(lines):
        left -= len(tokenizer.encode(line, add_special_tokens=False)) + 1
        if left < 0:
            break
        chosen.append(line)
    return "\n".join([head, *reversed(chosen)])


def _line(item: JSON, tokenizer: Tokenizer) -> str:
    match item["type"]:
        case "message":
            return f"{item['role']}: {_first(item_text(item), tokenizer)}"
        case "function_call":
            return f"called {item['name']}({_cut(item['arguments'], tokenizer, _FIRST_TOKENS)})"
        case "function_call_output":
            return f"result: {_cut(item_text(item), tokenizer, _FIRST_TOKENS)}"
        case "compaction":
            return item_text(item)
        case _:
            return ""


def _first(text: str, tokenizer: Tokenizer) -> str:
    """Whole sentences from the beginning, as many as fit."""
    taken = ""
    for sentence in _sentences(text.strip()):
        if len(tokenizer.encode(taken + sentence, add_special_tokens=False)) > _FIRST_TOKENS:
            break
        taken += sentence + " "
    return taken.rstrip() or _cut(text, tokenizer, _FIRST_TOKENS)


def _sentences(text: str) -> Iterator[str]:
    yield from (sentence for sentence in _SENTENCE_END.split(text) if sentence)


def _cut(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """The text with its middle replaced by a note of how much was cut, when it is longer than that."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) <= tokens:
        return text
    head, tail = tokens - tokens // 3, tokens // 3
    decode: Callable[[Sequence[int]], str] = tokenizer.decode
    return f"{decode(ids[:head])} [... {len(ids) - head - tail} tokens cut ...] {decode(ids[len(ids) - tail :])}"


def _shorten(step: Step, tokenizer: Tokenizer, tokens: int) -> list[JSON]:
    """Cuts the outputs of tools in a step; returns what was cut."""
    done: list[JSON] = []
    for index, item in enumerate(step.items):
        if item["type"] != "function_call_output":
            continue
        text = item_text(item)
        cut = _cut(text, tokenizer, tokens)
        if len(cut) < len(text):
            step.items[index] = item | {"output": cut}
            before, after = (len(tokenizer.encode(each, add_special_tokens=False)) for each in (text, cut))
            done.append({"call_id": item["call_id"], "tokens_before": before, "tokens_after": after})
    return done
