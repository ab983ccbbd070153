"""Grammars that force calls, matched by llguidance: they take what the dialect's parser reads, and nothing else."""

from __future__ import annotations

import functools
import json
from typing import Any

import llguidance
import llguidance.hf
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenmill.text.dialect import PARSERS, Chain
from tokenmill.text.tokenizer import Tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "maxLength": 10}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
SPECIAL = {
    "hermes": [],
    "llama3_json": ["<|python_tag|>"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]"],
    "pythonic": [],
    "deepseek": [
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ],
    "harmony": ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|constrain|>"],
}  # fmt: skip
ONE = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rom", "days": 2}}\n</tool_call>',
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "Rom", "days": 2}}',
    "mistral": '[TOOL_CALLS]get_weather[ARGS]{"city": "Rom", "days": 2}',
    "pythonic": '[get_weather(city="Rom", days=2)]',
    "deepseek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Rom", "days": 2}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "harmony": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rom", "days": 2}',
}
TWO = {
    "hermes": ONE["hermes"] + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama3_json": ONE["llama3_json"] + '; {"name": "now", "parameters": {}}',
    "mistral": ONE["mistral"] + "[TOOL_CALLS]now[ARGS]{}",
    "pythonic": '[get_weather(city="Rom"), now()]',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Rom"}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
}


@functools.cache
def tokens_of(special: tuple[str, ...]) -> tuple[Tokenizer, Any]:
    """A tokenizer of bytes with some special tokens, for us and for llguidance."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", *special])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    return Tokenizer(backend), llguidance.hf.from_tokenizer(fast)


def accepts(grammar: str, special: list[str], text: str) -> bool:
    tokenizer, ll_tokenizer = tokens_of(tuple(special))
    matcher = llguidance.LLMatcher(ll_tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.get_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def grammar_of(name: str, choice: Any, parallel: bool = True, prompt: str = "") -> str:
    tokenizer, _ = tokens_of(tuple(SPECIAL[name]))
    grammar = Chain((PARSERS.get(name),)).grammar(TOOLS, choice, parallel, tokenizer.added_id, prompt)
    assert grammar is not None
    return grammar


@pytest.mark.parametrize("name", SPECIAL)
def test_a_forced_call_is_one_that_the_parser_reads(name: str) -> None:
    grammar = grammar_of(name, "required")
    assert accepts(grammar, SPECIAL[name], ONE[name])
    [call] = Chain((PARSERS.get(name),)).split(ONE[name], TOOLS).tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Rom", "days": 2})


@pytest.mark.parametrize("name", TWO)
def test_several_calls_are_taken_only_where_they_are_allowed(name: str) -> None:
    assert accepts(grammar_of(name, "required"), SPECIAL[name], TWO[name])
    assert not accepts(grammar_of(name, "required", parallel=False), SPECIAL[name], TWO[name])
    assert len(Chain((PARSERS.get(name),)).split(TWO[name], TOOLS).tool_calls) == 2


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_not_the_call_asked_for_is_not_taken(name: str) -> None:
    named = grammar_of(name, {"type": "function", "function": {"name": "get_weather"}})
    assert accepts(named, SPECIAL[name], ONE[name])
    for wrong in (
        "Hello",
        ONE[name].replace("get_weather", "now"),
        ONE[name].replace("2", '"2"'),
        ONE[name].replace("city", "town"),
        ONE[name].replace('"Rom"', '"a text that is too long"'),
    ):
        assert not accepts(named, SPECIAL[name], wrong)


def test_mistral_without_the_newer_tokens_is_forced_to_write_a_list() -> None:
    tokenizer, _ = tokens_of(("[TOOL_CALLS]",))
    grammar = Chain((PARSERS.get("mistral"),)).grammar(TOOLS, "required", True, tokenizer.added_id)
    text = '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rom"}}, {"name": "now", "arguments": {}}]'
    assert grammar is not None
    assert accepts(grammar, ["[TOOL_CALLS]"], text)
    assert len(Chain((PARSERS.get("mistral"),)).split(text, TOOLS).tool_calls) == 2


@pytest.mark.parametrize("special", [[], ["<think>", "</think>"]])
@pytest.mark.parametrize(
    ("prompt", "text", "taken"),
    [
        ("<think>\n", "So < x.\n</think>\n\n", True),
        ("<think>\n", "", False),
        ("", "<think>\nSo.</think>\n\n", True),
        ("", "", True),
        ("", "So.</think>", False),
    ],
)
def test_thoughts_come_before_a_forced_call(special: list[str], prompt: str, text: str, taken: bool) -> None:
    tokenizer, _ = tokens_of(tuple(special))
    chain = Chain((PARSERS.get("think_tags"), PARSERS.get("hermes")))
    grammar = chain.grammar(TOOLS, "required", False, tokenizer.added_id, prompt)
    assert grammar is not None
    assert accepts(grammar, special, text + ONE["hermes"]) == taken


@pytest.mark.parametrize(
    ("required", "taken", "refused"),
    [
        ([], ["f()", "f(a=1)", "f(b=2)", "f(a=1, b=2)"], ["f(b=2, a=1)", "f(a=1 b=2)", "f(a=1, )", "f(a=x)"]),
        (["b"], ["f(b=2)", "f(b=2, a=1)"], ["f()", "f(a=1)", "f(a=1, b=2)"]),
        (["a", "b"], ["f(a=1, b=2)"], ["f(a=1)", "f(b=2)", "f()"]),
    ],
)
def test_python_keywords_follow_the_schema(required: list[str], taken: list[str], refused: list[str]) -> None:
    schema = {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": required}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    grammar = Chain((PARSERS.get("pythonic"),)).grammar(tools, "required", False, lambda text: None)
    assert grammar is not None
    assert [call for call in taken + refused if accepts(grammar, [], f"[{call}]")] == taken
