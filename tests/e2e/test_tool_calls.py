"""The built-in model calls functions, and its dialect reads the calls."""

from __future__ import annotations

import json

import pytest

from tokenmill import LLM, SamplingParams
from tokenmill.models.demo import tasks
from tokenmill.text.chat import render
from tokenmill.text.dialect import PARSERS, Chain, choose, gather


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo")


def test_the_demo_models_calls_are_read_streamed_or_whole(llm: LLM) -> None:
    given = tasks.generate("tool_call", 11, 20)
    chain = choose(llm.tokenizer.chat_template)
    assert chain == Chain((PARSERS.get("hermes"),))
    prompts = [render(llm.tokenizer, task.messages, task.tools) for task in given]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=200))
    right = 0
    for task, prompt, output in zip(given, prompts, outputs, strict=True):
        text = output.outputs[0].text
        parsed = chain.split(text, task.tools, prompt)
        parser = chain.parser(task.tools, prompt)
        pushed = [parser.push(llm.tokenizer.token_text(token)) for token in output.outputs[0].token_ids]
        streamed = gather([delta for deltas in [*pushed, parser.finish()] for delta in deltas])
        assert [call.arguments for call in streamed.tool_calls] == [call.arguments for call in parsed.tool_calls]
        expected = tasks.parse_tool_call(task.answer)
        calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in parsed.tool_calls]
        right += calls == [expected] and parsed.content == ""
    assert right >= 18


def test_a_history_with_a_call_and_its_result_reads_as_the_model_writes_it(llm: LLM) -> None:
    [task] = tasks.generate("tool_call", 12, 1)
    call = tasks.parse_tool_call(task.answer)
    assert call is not None
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
    messages = [
        *task.messages,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "21 degrees"}]},
    ]
    prompt = render(llm.tokenizer, messages, task.tools)
    assert f"<|im_start|>assistant\n{task.answer}<|im_end|>\n" in prompt
    assert prompt.endswith(
        "<|im_start|>user\n<tool_response>\n21 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
