"""Choosing the dialects of a model, and what a chain of them does."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tokenmill.errors import ConfigError, RequestError
from tokenmill.text.delta import Content, Reasoning, ToolArguments, ToolCall
from tokenmill.text.dialect import PARSERS, Chain, choose

TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TEMPLATES = {
    "qwen2.5": ('<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}', ["hermes"]),
    "qwen3": ("<tool_call> {{ message.reasoning_content }} </think>", ["think_tags", "hermes"]),
    "qwen3-coder": ("<tool_call>\n<function=example_function_name>", []),
    "glm-4.5": ("<tool_call>{function-name}\n<arg_key>", []),
    "llama-3.1": (
        "<|start_header_id|> Respond in the format {\"name\": function name, \"parameters\": dictionary}",
        ["llama3_json"],
    ),
    "llama-4-pythonic": ("<|header_start|> [func_name1(params_name1=params_value1), func_name2(params)]", ["pythonic"]),
    "mistral": ("[INST] [/INST] [TOOL_CALLS]", ["mistral"]),
    "deepseek-v3": ("<｜User｜> <｜tool▁calls▁begin｜>", ["deepseek"]),
    "deepseek-r1": ("<｜Assistant｜><think>\\n <｜tool▁calls▁begin｜>", ["think_tags", "deepseek"]),
    "gpt-oss": ("<|start|>assistant<|channel|>analysis<|message|>", ["harmony"]),
    "plain": ("<|im_start|>user", []),
}  # fmt: skip


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_chat_template_shows_the_dialects(family: str) -> None:
    template, names = TEMPLATES[family]
    assert choose(template) == Chain(tuple(PARSERS.get(name) for name in names))


def test_a_model_without_a_template_speaks_none() -> None:
    assert choose(None) == Chain()
    assert choose(None).split(f"<think>{CALL}", TOOLS).content == f"<think>{CALL}"


def test_dialects_are_chosen_by_name_too() -> None:
    chain = choose(TEMPLATES["qwen3"][0], tool_parser="llama3-json", reasoning_parser="none")
    assert chain == Chain((PARSERS.get("llama3_json"),))


@pytest.mark.parametrize(
    ("names", "code"),
    [
        ({"tool_parser": "hermse"}, "unknown_choice"),
        ({"tool_parser": "think_tags"}, "wrong_parser"),
        ({"reasoning_parser": "hermes"}, "wrong_parser"),
    ],
)
def test_a_wrong_name_is_refused(names: dict[str, str], code: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose("", **names)
    assert error.value.code == code


def test_reasoning_is_read_before_calls() -> None:
    chain = choose(TEMPLATES["qwen3"][0])
    parsed = chain.split(f"Is it {CALL}?</think>\n\nYes.{CALL}", TOOLS, "<think>\n")
    assert parsed.reasoning == f"Is it {CALL}?"
    assert parsed.content == "Yes."
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [("f", '{"a": 1}')]


def test_without_tools_a_call_is_text_and_reasoning_is_still_read() -> None:
    parsed = choose(TEMPLATES["qwen3"][0]).split(f"<think>So.</think>{CALL}")
    assert (parsed.content, parsed.reasoning, parsed.tool_calls) == (CALL, "So.", ())


def test_a_call_comes_as_its_name_and_then_its_arguments() -> None:
    parser = choose(TEMPLATES["qwen3"][0]).parser(TOOLS)
    assert parser.push("<think>a</think>b") == [Reasoning("a"), Content("b")]
    assert parser.push(CALL[:-3]) == []
    call, arguments = parser.push(CALL[-3:])
    assert isinstance(call, ToolCall)
    assert (call.index, call.name) == (0, "f")
    assert arguments == ToolArguments(0, '{"a": 1}')
    assert parser.push(CALL)[0].index == 1
    assert parser.finish() == []


@pytest.mark.parametrize("name", [n for n in PARSERS.names() if "tools" in PARSERS.get(n).kinds])
def test_every_call_has_an_id_of_its_own(name: str) -> None:
    dialect = PARSERS.get(name)
    ids = {dialect.new_id() for _ in range(100)}
    assert len(ids) == 100
    form = r"[a-zA-Z0-9]{9}" if name == "mistral" else r"call_[0-9a-f]{24}"
    assert all(re.fullmatch(form, each) for each in ids)


@pytest.mark.parametrize("pieces", [["</s</s>>x"], list("</s</s>>x"), ["</s", "</s>", ">x"]])
def test_dropped_tokens_are_dropped_however_the_text_is_cut(pieces: list[str]) -> None:
    parser = Chain((PARSERS.get("mistral"),)).parser(TOOLS)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    assert "".join(delta.text for delta in deltas if isinstance(delta, Content)) == "</s>x"


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_nothing_is_forced_unless_asked(choice: Any) -> None:
    assert choose(TEMPLATES["qwen3"][0]).grammar(TOOLS, choice, True, lambda text: None) is None


@pytest.mark.parametrize(
    ("template", "tools", "choice", "code"),
    [
        ("qwen3", TOOLS, {"type": "function", "function": {"name": "g"}}, "unknown_tool"),
        ("qwen3", [], "required", "unknown_tool"),
        ("plain", TOOLS, "required", "unsupported_tool_choice"),
    ],
)
def test_what_cannot_be_forced_is_refused(template: str, tools: list[Any], choice: Any, code: str) -> None:
    with pytest.raises(RequestError) as error:
        choose(TEMPLATES[template][0]).grammar(tools, choice, True, lambda text: None)
    assert error.value.code == code
