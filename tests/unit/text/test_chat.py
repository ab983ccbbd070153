"""Chat templates: the semantics that templates of Hugging Face models rely on."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tokenmill.errors import RequestError
from tokenmill.text.chat import encode_chat, render
from tokenmill.text.tokenizer import Tokenizer

CHATML = """\
{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
{% endif %}
{% for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role not in ['user', 'assistant', 'system', 'tool'] %}
        {{- raise_exception('Unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}
    {{- message.content }}
    {%- endgeneration %}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name + (call.function.arguments | tojson(indent=2)) }}
    {%- endfor %}
    {{- eos_token + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{% endif %}
"""
USER = {"role": "user", "content": "Grüße <b>'1' & \"2\"</b>"}
TOOL = {"type": "function", "function": {"name": "zeit", "description": "Ö <&>", "parameters": {"b": 1, "a": 2}}}


@pytest.fixture
def tokenizer(byte_level_backend: Any) -> Tokenizer:
    return Tokenizer(byte_level_backend, {"eos_token": "<|im_end|>"}, (2,), CHATML)


def with_template(backend: Any, template: str | None) -> Tokenizer:
    return Tokenizer(backend, chat_template=template)


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_same_prompt_as_transformers(
    tokenizer: Tokenizer, tools: list[Any] | None, add_generation_prompt: bool, variables: dict[str, Any]
) -> None:
    arguments = {"b": "ü", "a": [1, None]}
    messages = [
        USER,
        {"role": "skip", "content": "never shown"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "zeit", "arguments": arguments}}]},
    ]
    [expected], _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=CHATML,
        add_generation_prompt=add_generation_prompt,
        eos_token="<|im_end|>",
        **variables,
    )
    ours = render(tokenizer, messages, tools, add_generation_prompt, **variables)
    assert ours == expected
    assert "never shown" not in ours
    assert ("assistant\n<think>" in ours) == (bool(variables) and add_generation_prompt)


def test_special_tokens_of_the_template_are_not_doubled(tokenizer: Tokenizer) -> None:
    ids = encode_chat(tokenizer, [USER])
    assert ids[0] == 1
    assert ids.count(1) == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == render(tokenizer, [USER])


def test_text_parts_and_missing_content(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    prompt = render(
        tokenizer, [{"role": "user", "content": parts}, {"role": "assistant", "content": None}], None, False
    )
    assert prompt == "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (5, "messages[1].content"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "messages[1].content[0]"),
        ([{"type": "text", "text": "fine"}, {"type": "text"}], "messages[1].content[1]"),
        (["text"], "messages[1].content[0]"),
    ],
)
def test_content_that_is_no_text_is_named(tokenizer: Tokenizer, content: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(tokenizer, [USER, {"role": "user", "content": content}])
    assert (caught.value.code, caught.value.field) == ("unsupported_content", field)


def test_arguments_of_tool_calls_are_objects_unless_they_are_not_json(tokenizer: Tokenizer) -> None:
    def shown(arguments: Any) -> str:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        prompt = render(tokenizer, [{"role": "assistant", "content": None, "tool_calls": [call]}], None, False)
        return prompt.removeprefix("<|im_start|>assistant\nf").removesuffix("<|im_end|>\n")

    assert shown('{"b": 1, "a": "é"}') == '{\n  "b": 1,\n  "a": "é"\n}'
    assert shown('{"b": ') == '"{\\"b\\": "'


def test_no_template(byte_level_backend: Any) -> None:
    with pytest.raises(RequestError) as caught:
        render(with_template(byte_level_backend, None), [USER])
    assert caught.value.code == "no_chat_template"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
def test_template_that_fails_or_escapes_is_a_request_error(byte_level_backend: Any, template: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        render(with_template(byte_level_backend, template), [USER])
    assert caught.value.code == "chat_template_failed"


def test_callers_messages_are_not_changed(tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    render(tokenizer, [message])
    assert message == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert call["function"]["arguments"] == "{}"


def test_strftime_now(byte_level_backend: Any) -> None:
    template = "{{ strftime_now('%Y') | int > 2000 }}"
    assert render(with_template(byte_level_backend, template), [USER]) == "True"


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("call.function.arguments | tojson", '{"a": "ü"}'),
        ("'```json' + call.function.arguments + '```'", '```json{"a": "ü"}```'),
        ("call.function.arguments", '{"a": "ü"}'),
        ("call.function.arguments.a", "ü"),
        ("call.function.arguments is mapping", "True"),
        ("call.function | tojson", '{"name": "f", "arguments": {"a": "ü"}}'),
    ],
)
def test_arguments_of_a_call_are_an_object_and_a_text(byte_level_backend: Any, expression: str, expected: str) -> None:
    template = "{% for call in messages[0].tool_calls %}{{ " + expression + " }}{% endfor %}"
    tokenizer = with_template(byte_level_backend, template)
    assert render(tokenizer, [{"role": "assistant", "content": None, "tool_calls": [CALL]}]) == expected


def test_a_call_without_arguments_has_an_empty_object(byte_level_backend: Any) -> None:
    tokenizer = with_template(byte_level_backend, "{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    call = {"function": {"name": "f", "arguments": ""}}
    assert render(tokenizer, [{"role": "assistant", "tool_calls": [call]}]) == "{}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{{ messages[0]['content'] is none }}", "True"), ("{{ 'x' in messages[0].content }}", "False")],
)
def test_a_call_without_content_is_what_the_template_expects(
    byte_level_backend: Any, template: str, expected: str
) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert render(with_template(byte_level_backend, template), [message]) == expected


def test_fields_that_a_client_sends_as_null_are_absent(byte_level_backend: Any) -> None:
    template = "{{ messages[0].tool_calls is defined }} {{ messages[0].refusal is defined }}"
    message = {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None}
    assert render(with_template(byte_level_backend, template), [message]) == "False False"
    assert render(with_template(byte_level_backend, template), [{**message, "tool_calls": []}]) == "False False"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize(("content", "thinking"), [("", "So."), ("4", "")])
def test_reasoning_has_the_name_that_a_template_reads(
    byte_level_backend: Any, name: str, content: str, thinking: str
) -> None:
    tokenizer = with_template(byte_level_backend, "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}")
    assert render(tokenizer, [{"role": "assistant", "content": content, name: "So."}]) == f"So.|{thinking}"
