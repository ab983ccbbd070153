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
    "hermes": ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": "<tool_call>"}}', "<tool_", "call>"],
    "llama3_json": ["<|python_tag|>", '{"name": "f", "parameters": {}}', "; ", '{"answer": 1}', "<|py", "<|eot_id|>"],
    "mistral": ["[TOOL_CALLS]", "[", "]", ", ", "f", "[ARGS]", "[CALL_ID]", "[TOOL", '{"name": "f"}', "</s>"],
    "pythonic": ["[", "]", "f(", ")", 'f(a="x)", b=[1])', ", ", "get_weather()", "a=", "true", "'"],
    "deepseek": [
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>", "function", "f", "\n```json\n", "\n```", "<｜tool", "<｜end▁of▁sentence｜>",
    ],
    "harmony": [
        "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>", "assistant",
        "analysis", "final", "commentary", " to=functions.f ", " to=python", "json", "<|cha", "nnel|>",
    ],
    "think_tags": ["<think>", "</think>", "<think", ">", "</", "think>", "\n\n"],
}  # fmt: skip
SHARED = ["{}", '{"a": 1}', '{"a": "\\"}"}', "{", "}", '"', "\\", " ", "\n", "zebra", "é😀", "<", "[", "{'", "1"]
PROMPTS = ["", "<think>\n", "<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>So "]


def test_every_dialect_is_tried() -> None:
    assert set(FRAGMENTS) == set(PARSERS.names())


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


def read(name: str, text: str, prompt: str = "") -> tuple[Any, ...]:
    chain = Chain((PARSERS.get(name),))
    whole = shape(chain.split(text, TOOLS, prompt))
    assert shape(gather(parse(chain, list(text), prompt))) == whole
    return whole


DEEPSEEK_V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Köln"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n'
    "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
DEEPSEEK_V31 = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Köln"}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
TWO = [("get_weather", '{"city": "Köln"}'), ("f", "{}")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param(
            "hermes",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n',
            id="hermes",
        ),
        pytest.param(
            "hermes",
            '<tool_call>{"arguments": {"city": "Köln"}, "name": "get_weather"}</tool_call><tool_call>{"name": "f"}',
            id="hermes: any order, no arguments, no closing tag at the end",
        ),
        pytest.param(
            "llama3_json",
            '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Köln"}}; {"name": "f", "parameters": {}}'
            "<|eom_id|>",
            id="llama: with the token",
        ),
        pytest.param(
            "llama3_json",
            '\n{"type": "function", "name": "get_weather", "parameters": {"city": "Köln"}};{"name": "f", "arguments": '
            "{}}<|eot_id|>",
            id="llama: bare",
        ),
        pytest.param(
            "mistral",
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Köln"}}, '
            '{"name": "f", "arguments": {}, "id": "123456789"}]</s>',
            id="mistral: list",
        ),
        pytest.param(
            "mistral",
            '[TOOL_CALLS]get_weather[ARGS]{"city": "Köln"}[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{}</s>',
            id="mistral: names",
        ),
        pytest.param("mistral", '[TOOL_CALLS]get_weather{"city": "Köln"}[TOOL_CALLS]f{}', id="mistral: no separators"),
        pytest.param("pythonic", "[get_weather(city='Köln'), f()]", id="pythonic"),
        pytest.param("deepseek", DEEPSEEK_V3, id="deepseek v3"),
        pytest.param("deepseek", DEEPSEEK_V31, id="deepseek v3.1"),
        pytest.param(
            "harmony",
            '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Köln"}<|call|>'
            "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
            id="harmony",
        ),
    ],
)
def test_calls_are_read_with_their_arguments_as_written(name: str, text: str) -> None:
    assert read(name, text) == ("", "", TWO)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}'),
        ("deepseek", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'),
    ],
)
def test_content_around_calls_stays(name: str, call: str) -> None:
    assert read(name, f"Let me see.{call}") == ("Let me see.", "", [("f", '{"a": 1}')])
    assert read(name, f" \n{call}") == ("", "", [("f", '{"a": 1}')])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call> and on'),
        ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": 3}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'),
        ("hermes", "<tool_call>" + '{"a":' * 5000 + "1" + "}" * 5000 + "</tool_call>"),
        ("hermes", '<tool_call>{"name": "f"}} </tool_call>'),
        ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
        ("llama3_json", '{"name": "nobody", "parameters": {}}'),
        ("llama3_json", 'The call {"name": "f", "parameters": {}} would do it.'),
        ("mistral", "[TOOL_CALLS] []"),
        ("mistral", "[TOOL_CALLS]nobody[ARGS]{}"),
        ("pythonic", "[1] says so."),
        ("pythonic", "[f(1)]"),
        ("pythonic", "[f(a=__import__('os'))]"),
        ("pythonic", "[f(a=b'x')]"),
        ("pythonic", "[f(a=1e999)]"),
        ("pythonic", "[f(**{'a': 1})]"),
        ("pythonic", "[f(a='\\ud800')]"),
        ("pythonic", "[f(a=" + "-" * 20000 + "1)]"),
        ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}"[:-1]),
        ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"),
        ("harmony", "<|channel|>commentary to=functions.nobody <|constrain|>json<|message|>{}<|call|>"),
        ("harmony", "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{<|call|>"),
        ("harmony", "<|channel|>analysis"),
        ("harmony", "<|start|>user<|message|>Hello"),
        ("think_tags", "No thoughts </think> here."),
    ],
)
def test_what_is_no_well_formed_call_of_a_known_function_comes_back_as_text(name: str, text: str) -> None:
    assert read(name, text) == (text, "", [])


def test_after_a_malformed_call_the_next_one_is_still_read() -> None:
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read("hermes", f'<tool_call>{{"name": "f"<tool_call>{good}') == (
        '<tool_call>{"name": "f"<tool_call>', "", [("f", "{}")],
    )  # fmt: skip


def test_python_literals_become_json() -> None:
    text = "[f(a=-1.5, b=(1, 2), c={'k': None}, d=true, e=\"it's \\ud83d\\ude00\", g=[False])]"
    [(name, arguments)] = read("pythonic", text)[2]
    assert name == "f"
    assert json.loads(arguments) == {"a": -1.5, "b": [1, 2], "c": {"k": None}, "d": True, "e": "it's 😀", "g": [False]}


def test_a_json_answer_that_is_no_call_is_not_held_back() -> None:
    parser = Chain((PARSERS.get("llama3_json"),)).parser(TOOLS)
    assert parser.push('{"answer": ') == [Content('{"answer'), Content('": ')]
    assert parser.push("42") == [Content("42")]


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("<think>\nSo.</think>\n\n4", "", ("4", "So.", [])),
        ("So.\n</think>\n\n4", "<|im_start|>assistant\n<think>\n", ("4", "So.\n", [])),
        ("<think>So.</think>4", "<think>", ("4", "So.", [])),
        ("So, still", "<think>\n", ("", "So, still", [])),
        ("4", "<think>\n\n</think>\n\n", ("4", "", [])),
        ("A <think> tag", "", ("A <think> tag", "", [])),
        ("<think></think>", "", ("", "", [])),
    ],
)
def test_thoughts_are_told_from_the_answer(text: str, prompt: str, expected: tuple[Any, ...]) -> None:
    assert read("think_tags", text, prompt) == expected


def test_reasoning_is_sent_on_at_once_but_not_what_may_be_its_end() -> None:
    parser = Chain((PARSERS.get("think_tags"),)).parser(TOOLS, "<think>")
    assert parser.push("a < b") == [Reasoning("a < b")]
    assert parser.push(" </th") == [Reasoning(" ")]
    assert parser.push("en </think>") == [Reasoning("</then ")]


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        (
            "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
            "<|start|>assistant",
            ("4", "Sum.", []),
        ),
        ("<|channel|>commentary<|message|>I will look.<|end|>", "", ("I will look.", "", [])),
        (" more<|return|>", "<|start|>assistant<|channel|>final<|message|>Some", (" more", "", [])),
        ("Sum.<|end|>", "<|start|>assistant<|channel|>analysis<|message|>", ("", "Sum.", [])),
        (
            '{"a": 1}',
            "<|start|>assistant<|channel|>commentary to=functions.f<|message|>",
            ("", "", [("f", '{"a": 1}')]),
        ),
        ("Plain.", "<|start|>assistant", ("Plain.", "", [])),
    ],
)
def test_channels_are_told_apart(text: str, prompt: str, expected: tuple[Any, ...]) -> None:
    assert read("harmony", text, prompt) == expected
