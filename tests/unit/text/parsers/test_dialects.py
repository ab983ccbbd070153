"""What each dialect reads, and that it reads the same however the text is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.text.delta import Content, Delta, Parsed, Reasoning, ToolArguments, gather
from tokenmill.text.dialect import PARSERS, Chain

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "get_weather")]

FRAGMENTS = {
    "hermes": ["<tool_call>", "</tool_call>", "\n", '{"name": "f", "arguments": {"a": "<tool_call>"}}', "<tool_", "call>"],
    "llama3_json": ["<|python_tag|>", '{"name": "f", "parameters": {}}', "; ", '{"answer": 1}', "<|py", "<|eot_id|>"],
    "mistral": ["[TOOL_CALLS]", "[", "]", ", ", "f", "[ARGS]", "[CALL_ID]", "[TOOL", '{"name": "f", "arguments": {}}', "</s>"],
    "pythonic": ["[", "]", "f(", ")", 'f(a="x)", b=[1])', ", ", "get_weather()", "a=", "true", "'"],
    "deepseek": [
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
        "function", "f", "\n```json\n", "\n```", "<｜tool", "<｜end▁of▁sentence｜>",
    ],
    "harmony": [
        "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>", "assistant",
        "analysis", "final", "commentary", " to=functions.f ", " to=python", "json", "<|cha", "nnel|>",
    ],
    "think_tags": ["<think>", "</think>", "<think", ">", "</", "think>", "\n\n"],
}  # fmt: skip
SHARED = ["{}", '{"a": 1}', '{"a": "\\"}"}', "{", "}", '"', "\\", " ", "\n", "zebra", "é😀", "<", "[", "{'", "1"]
PROMPTS = ["", "<think>\n", "<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>So "]


def parse(chain: Chain, pieces: list[str], prompt: str) -> list[Delta]:
    parser = chain.parser(TOOLS, prompt)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return deltas + parser.finish()


def shape(parsed: Parsed) -> tuple[Any, ...]:
    return parsed.content, parsed.reasoning, [(call.name, call.arguments) for call in parsed.tool_calls]


def texts(name: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(FRAGMENTS[name] + SHARED) | st.text(max_size=3), max_size=14)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_however_the_text_is_cut_the_answer_is_the_same_and_nothing_is_lost(name: str) -> None:
    chain = Chain((PARSERS.get(name),))

    @settings(max_examples=400, deadline=None)
    @given(fragments=texts(name), prompt=st.sampled_from(PROMPTS), data=st.data())
    def check(fragments: list[str], prompt: str, data: st.DataObject) -> None:
        text = "".join(fragments)
        whole = parse(chain, [text], prompt)
        expected = shape(gather(whole))
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
        for pieces in (list(text), fragments, [text[a:b] for a, b in itertools.pairwise(cuts)]):
            assert shape(gather(parse(chain, pieces, prompt))) == expected
        for token in chain.dialects[0].dropped:
            text = text.replace(token, "")
        check_order(text, whole, verbatim=name != "pythonic")
        if all(isinstance(delta, Content) for delta in whole) and name not in ("harmony", "think_tags"):
            assert expected[0] == text

    check()


def check_order(text: str, deltas: list[Delta], verbatim: bool) -> None:
    """Every piece is a piece of the text, in its order."""
    at = 0
    for delta in deltas:
        if isinstance(delta, Content | Reasoning) or (isinstance(delta, ToolArguments) and verbatim):
            if delta.text == "{}" and text.find("{}", at) < 0:  # a call without arguments
                continue
            at = text.index(delta.text, at) + len(delta.text)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_text_without_markers_is_sent_on_at_once(name: str) -> None:
    parser = Chain((PARSERS.get(name),)).parser(TOOLS)
    for piece in ["So,", " the", " answer", " is", " 4", "2."]:
        assert parser.push(piece) == [Content(piece)]
    assert parser.finish() == []
