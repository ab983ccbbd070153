"""Each cause of a lost prefix is named, whatever the template looks like."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.models.folder import resolve
from tokenmill.text.drift import Conversation, common_length, compare, volatile
from tokenmill.text.tokenizer import Tokenizer


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": more}}}


MESSAGES = [
    {"role": "system", "content": "You are a careful assistant of the house."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
]
BEFORE = Conversation(MESSAGES, [tool("a"), tool("b", x={"type": "integer"})])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(resolve("demo")))


def drift(tokenizer: Tokenizer, before: Conversation, after: Conversation) -> Any:
    ids = [tokenizer.encode(each.text(tokenizer), add_special_tokens=False) for each in (before, after)]
    return compare(tokenizer, before, ids[0], after, ids[1])


def changed(index: int, content: str) -> Conversation:
    messages = copy.deepcopy(MESSAGES)
    messages[index]["content"] = content
    return Conversation(messages, BEFORE.tools)


@pytest.mark.parametrize(
    ("after", "cause", "words"),
    [
        (Conversation([*MESSAGES, {"role": "assistant", "content": "6"}], BEFORE.tools), "none", ""),
        (Conversation(MESSAGES, BEFORE.tools[::-1]), "tools_reordered", "tools reordered"),
        (Conversation(MESSAGES, [*BEFORE.tools, tool("c")]), "tools_added", "c"),
        (Conversation(MESSAGES, BEFORE.tools[:1]), "tools_removed", "b"),
        (Conversation(MESSAGES, [tool("a"), tool("b", y={})]), "tools_changed", "b"),
        (changed(0, "You are a careful  assistant of the house."), "message_whitespace", "messages[0] (system)"),
        (changed(0, "You are a careless assistant."), "message_changed", "messages[0] (system) changed in content"),
        (changed(2, "Four"), "message_changed", "messages[2] (assistant)"),
        (Conversation([MESSAGES[0], *MESSAGES[3:]], BEFORE.tools), "message_dropped", "2 messages dropped"),
        (Conversation([MESSAGES[0], {"role": "user", "content": "Hello"}, *MESSAGES[1:]], BEFORE.tools),
         "message_inserted", "before messages[1]"),
    ],
)  # fmt: skip
def test_the_cause_is_named(tokenizer: Tokenizer, after: Conversation, cause: str, words: str) -> None:
    found = drift(tokenizer, BEFORE, after)
    assert found.cause == cause
    assert words in found.detail
    if cause != "none":
        assert f"at token {found.shared_tokens}: " in str(found)
        assert found.before != found.after


def test_a_time_in_the_system_prompt_is_told_from_other_changes(tokenizer: Tokenizer) -> None:
    one, other = (
        Conversation([{"role": "system", "content": f"It is {now}. Be brief."}, *MESSAGES[1:]])
        for now in ("2026-11-25T01:02:03Z", "2026-11-25T01:07:44Z")
    )
    assert drift(tokenizer, one, other).cause == "message_volatile"
    assert volatile(one) == [("messages[0] (system)", "2026-11-25T01:02:03Z")]
    assert volatile(BEFORE) == []


def test_of_two_changes_the_one_that_comes_first_in_the_prompt_counts(tokenizer: Tokenizer) -> None:
    messages = copy.deepcopy(MESSAGES)
    messages[3]["content"] = "And 4 + 4?"
    assert drift(tokenizer, BEFORE, Conversation(messages, BEFORE.tools[::-1])).cause == "tools_reordered"


def test_no_prompt_text_stands_in_the_words(tokenizer: Tokenizer) -> None:
    found = drift(tokenizer, BEFORE, changed(0, "A secret that nobody may log."))
    assert "secret" not in str(found)
    assert "secret" in found.after


def test_plain_prompts_have_no_parts_to_name(tokenizer: Tokenizer) -> None:
    assert compare(tokenizer, None, [1, 2, 3], None, [1, 2, 4]).cause == "prompt"
    assert compare(tokenizer, None, [1, 2, 3], None, [1, 2, 3, 4]).cause == "none"


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_the_common_length_is_exact(shared: list[int], one: list[int], other: list[int]) -> None:
    one, other = shared + one, shared + other
    length = common_length(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


def test_a_random_edit_is_found_at_its_message(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(30):
        count = rng.randint(2, 8)
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": f"Text {rng.randint(0, 9**6)}"} for i in range(count)
        ]
        index = rng.randrange(count)
        edited = copy.deepcopy(messages)
        edited[index]["content"] += " edited"
        found = drift(tokenizer, Conversation(messages), Conversation(edited))
        assert found.cause == "message_changed"
        assert f"messages[{index}]" in found.detail
