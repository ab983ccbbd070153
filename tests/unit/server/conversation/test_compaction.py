"""POST /v1/responses/compact, and what it chooses."""

import json
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.server.conversation.compaction import compact, steps_of
from tokenmill.server.conversation.items import messages_of, normalized

BUDGET = 400


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def step(number: int, output: str, thought: str = "hm") -> list[dict[str, Any]]:
    return [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": thought}], "summary": []},
        {"type": "function_call", "call_id": f"c{number}", "name": "read", "arguments": f'{{"file": {number}}}'},
        {"type": "function_call_output", "call_id": f"c{number}", "output": output},
    ]


SYSTEM = {"role": "system", "content": "You are an agent."}
AGENT = [SYSTEM, user("Find the bug."), *(item for i in range(12) for item in step(i, f"line of file {i}. " * 20))]
CHAT = [SYSTEM, *(m for i in range(12) for m in (user(f"Question {i}? Please."), assistant(f"Answer {i}. " * 12)))]


async def compacted(http: httpx2.AsyncClient, items: list[Any], **fields: Any) -> dict[str, Any]:
    answer = await http.post("/v1/responses/compact", json={"input": items, "token_budget": BUDGET, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


@pytest.mark.parametrize("items", [AGENT, CHAT, [*CHAT, user("And now?")]], ids=["agent", "chat", "question"])
async def test_a_long_conversation_becomes_a_shorter_one_and_says_so(
    http: httpx2.AsyncClient, llm: Any, items: list[Any]
) -> None:
    found = await compacted(http, items)
    account = found["compaction"]
    assert found["object"] == "response.compaction"
    assert account["tokens_after"] <= BUDGET < account["tokens_before"]
    assert account["tokens_saved"] == account["tokens_before"] - account["tokens_after"]
    assert account["dropped"]["items"]
    # It is the input of the next request as it stands, and as long as it says.
    answer = (await http.post("/v1/responses", json={"input": found["output"]})).json()
    assert answer["usage"]["input_tokens"] == account["tokens_after"]
    assert account["tokens_before"] == len(_prompt(llm, items))
    shared = 0
    for one, other in zip(_prompt(llm, items), llm.calls[-1].prompt, strict=False):
        if one != other:
            break
        shared += 1
    block = llm.stats.block_size
    assert account["common_prefix_tokens"] == shared
    assert account["cacheable_tokens"] == shared // block * block
    # Nothing was generated for it.
    assert len(llm.calls) == 1
    assert found["usage"]["total_tokens"] == 0
    texts = [item for item in found["output"] if item["type"] == "message"]
    assert texts[0]["content"][0]["text"] == SYSTEM["content"]


def _prompt(llm: Any, items: list[Any]) -> list[int]:
    messages = messages_of(normalized(items))
    text = "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"
    return llm.tokenizer.encode(text, add_special_tokens=False)  # type: ignore[no-any-return]


async def test_what_fits_stays_as_it_is(http: httpx2.AsyncClient) -> None:
    found = await compacted(http, CHAT, token_budget=100_000)
    account = found["compaction"]
    assert (account["tokens_saved"], account["dropped"]["items"], account["summary"]) == (0, [], None)
    assert account["common_prefix_tokens"] == account["tokens_before"]
    assert [item["content"][0]["text"] for item in found["output"]] == [item["content"] for item in CHAT]


async def test_outputs_of_tools_are_shortened_before_anything_is_dropped(http: httpx2.AsyncClient) -> None:
    items = [user("Go."), *step(1, "start " + "x " * 1000 + "end"), *step(2, "short")]
    found = await compacted(http, items, tool_output_tokens=64)
    account = found["compaction"]
    assert account["dropped"]["items"] == []
    [cut] = account["shortened_tool_outputs"]
    assert cut["call_id"] == "c1"
    assert cut["tokens_after"] < 120 < cut["tokens_before"]
    [output, kept] = [item["output"] for item in found["output"] if item["type"] == "function_call_output"]
    assert output.startswith("start x")
    assert output.endswith("x end")
    assert "tokens cut ..." in output
    assert kept == "short"


async def test_the_summary_tells_what_was_dropped(http: httpx2.AsyncClient) -> None:
    found = await compacted(http, CHAT, token_budget=800)
    [summary] = [item for item in found["output"] if item["type"] == "compaction"]
    dropped = len(found["compaction"]["dropped"]["items"])
    assert summary["encrypted_content"].startswith(f"[Shortened: {dropped} earlier items.]")
    assert f"user: Question {dropped // 2 - 1}? Please." in summary["encrypted_content"]
    found = await compacted(http, CHAT, summary="none")
    [summary] = [item for item in found["output"] if item["type"] == "compaction"]
    assert summary["encrypted_content"].startswith("[Cut: ")


async def test_the_model_can_write_the_summary(client: openai.AsyncOpenAI, llm: Any) -> None:
    llm.pieces = ["They ", "talked."]
    found = await client.responses.compact(
        model="scripted", input=CHAT, extra_body={"summary": "model", "token_budget": BUDGET}
    )
    [call] = llm.calls
    assert "Question 3? Please." in llm.tokenizer.decode(call.prompt)
    assert call.params.max_tokens == BUDGET // 4 or call.params.max_tokens > 0
    [summary] = [item for item in found.output if item.type == "compaction"]
    assert summary.encrypted_content.endswith("They talked.")
    assert found.usage.input_tokens == len(call.prompt)
    assert found.usage.output_tokens > 0
    # The objects of the client are an input as they stand, too.
    answer = await client.responses.create(model="scripted", input=found.output)  # type: ignore[arg-type]
    assert answer.status == "completed"


async def test_a_kept_conversation_is_compacted_by_its_id(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="scripted", input=CHAT)  # type: ignore[arg-type]
    found = await client.responses.compact(
        model="scripted", previous_response_id=first.id, extra_body={"token_budget": BUDGET}
    )
    assert found.output[-1].content[0].text == "Hello world"  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"token_budget": 0}, "token_budget"),
        ({"tool_output_tokens": 1}, "tool_output_tokens"),
        ({"summary": "best"}, "summary"),
        ({"input": [{"type": "x"}]}, "input[0].type"),
        ({"model": "other"}, "model"),
        ({"budget": 1}, "budget"),
    ],
)
async def test_a_wrong_request_is_refused_with_its_field(
    http: httpx2.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    answer = await http.post("/v1/responses/compact", json={"input": "Hi", **fields})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


_TEXT = st.text(alphabet="ab .\n", max_size=40)
_STEPS = st.one_of(
    st.builds(lambda text: [user(text)], _TEXT),
    st.builds(lambda text: [assistant(text)], _TEXT),
    st.builds(lambda text: [{"role": "developer", "content": text}], _TEXT),
    st.builds(lambda text, n: step(n, text * 9, text), _TEXT, st.integers(0, 99)),
    st.builds(lambda text, n: step(n, text)[1:], _TEXT, st.integers(0, 99)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_STEPS, min_size=1, max_size=12), st.integers(1, 400), st.integers(16, 64))
def test_whatever_is_compacted_is_still_a_conversation(
    tokenizer: Any, steps: list[list[Any]], budget: int, tool_output_tokens: int
) -> None:
    items = normalized([item for each in steps for item in each])
    before = json.dumps(items)
    plan = compact(items, tokenizer, budget, tool_output_tokens)
    shorter = plan.items(["..." for _ in plan.gaps])
    messages_of(shorter)  # each output still has its call
    # Each item is kept, dropped, or a thought; none is lost or there twice.
    gone = [item["id"] for gap in plan.gaps for item in gap]
    kept = [item["id"] for item in shorter if item["type"] != "compaction"]
    assert sorted(gone + kept + _thoughts(items, gone + kept)) == sorted(item["id"] for item in items)
    assert len(_thoughts(items, gone + kept)) == plan.reasoning_items
    assert kept == [item["id"] for item in items if item["id"] in set(kept)]
    # What must stay stays.
    assert {item["id"] for each in steps_of(items) if each.fixed for item in each.items} <= {
        *kept,
        *_thoughts(items, gone + kept),
    }
    assert json.dumps(items) == before
    again = compact(items, tokenizer, 10**6, tool_output_tokens)
    assert (again.gaps, again.shortened) == ([], [])


def _thoughts(items: list[Any], others: list[str]) -> list[str]:
    return [item["id"] for item in items if item["type"] == "reasoning" and item["id"] not in set(others)]
