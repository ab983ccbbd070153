"""The engine with a fake executor: life of a request, refusals, failures, preemption, counting."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.config import build
from tokenmill.engine.config import BATCHING, POLICIES, EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.errors import RequestError
from tokenmill.testing import FakeClock, FakeExecutor, fake_facts, random_traffic
from tokenmill.types import EngineRequest, FinishReason, SamplingParams


def make(num_blocks=64, windows=(None,), next_token=None, max_model_len=64, cache=None, **scheduler):
    clock = FakeClock()
    executor = FakeExecutor(fake_facts(num_blocks, 4, max_model_len, windows), next_token, clock)
    scheduler = {"max_num_seqs": 8, "max_num_batched_tokens": 16, **scheduler}
    config = build(EngineConfig, {"scheduler": scheduler, "cache": {"block_size": 4, **(cache or {})}})
    return Engine(config, executor, clock), executor, clock


def request(name="a", prompt=range(1, 11), **fields) -> EngineRequest:
    params = fields.pop("params", None) or SamplingParams(max_tokens=fields.pop("max_tokens", 5))
    return EngineRequest(
        request_id=name, prompt_token_ids=list(prompt), params=params, arrival=fields.pop("arrival", 0.0), **fields
    )


def run(engine: Engine) -> dict[str, list]:
    outputs: dict[str, list] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def actions(engine: Engine, name: str) -> list[tuple[str, str, int]]:
    return [(event.action, event.reason, event.tokens) for event in engine.events.of(name)]


def test_a_request_is_chunked_then_decoded_and_the_events_tell_it():
    engine, _, _ = make(max_num_batched_tokens=8)
    engine.add(request(max_tokens=3))
    outputs = run(engine)["a"]
    assert [len(output.token_ids) for output in outputs] == [1, 1, 1]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert actions(engine, "a") == [
        ("arrive", "", 10),
        ("miss", "cold", 8),
        ("miss", "partial_block", 2),
        ("admit", "", 10),
        ("chunk", "", 8),
        ("chunk", "", 2),
        ("finish", "length", 3),
    ]
    assert engine.stats().blocks_used == 0


def test_decodes_come_before_chunks_and_the_budget_holds():
    engine, executor, _ = make(max_num_batched_tokens=6)
    engine.add(request("a", max_tokens=20, prompt=[1, 2]))
    engine.step()
    engine.add(request("b", prompt=range(1, 21)))
    run(engine)
    mixed = [plan for plan in executor.steps if len(plan.rows) == 2]
    assert mixed
    assert all(plan.rows[0].request_id == "a" and len(plan.rows[0].tokens) == 1 for plan in mixed[:-1])
    assert all(plan.tokens <= 6 for plan in executor.steps)


def test_stop_token_and_end_of_text():
    engine, _, _ = make(next_token=lambda history: 7 if len(history) == 13 else 5)
    engine.add(request("stop", params=SamplingParams(max_tokens=20, stop_token_ids=[7])))
    last = run(engine)["stop"][-1]
    assert (last.finish_reason, last.stop_token, last.stats.generated_tokens) == (FinishReason.STOP, 7, 4)
    engine, _, _ = make(next_token=lambda history: 0)
    engine.add(request("eos"))
    engine.add(request("ignore", params=SamplingParams(max_tokens=4, ignore_eos=True)))
    outputs = run(engine)
    assert (outputs["eos"][-1].finish_reason, outputs["eos"][-1].stop_token) == (FinishReason.STOP, None)
    assert outputs["ignore"][-1].stats.generated_tokens == 4


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"prompt": []}, "empty_prompt", "prompt"),
        ({"prompt": [1] * 64}, "prompt_too_long", "prompt"),
        ({"prompt": [100]}, "invalid_token", "prompt"),
        ({"prompt": [-1]}, "invalid_token", "prompt"),
        ({"adapter": "x"}, "unknown_adapter", "adapter"),
        ({"params": SamplingParams(stop_token_ids=[1000])}, "invalid_parameter", "stop_token_ids"),
        ({"params": SamplingParams(logit_bias={1000: 1.0})}, "invalid_parameter", "logit_bias"),
        ({"params": SamplingParams(bad_words_ids=[[1, 1000]])}, "invalid_parameter", "bad_words_ids"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_allocated(change, code, field):
    engine, _, _ = make()
    with pytest.raises(RequestError) as refused:
        engine.add(request(**change))
    assert (refused.value.code, refused.value.field) == (code, field)
    assert not engine.has_work
    assert engine.stats().blocks_used == 0
    assert actions(engine, "a")[0][:2] == ("refuse", code)


def test_an_id_in_use_is_refused():
    engine, _, _ = make()
    engine.add(request())
    with pytest.raises(RequestError, match="under way"):
        engine.add(request())


def test_the_longest_prompt_gets_one_token():
    engine, _, _ = make()
    engine.add(request(prompt=[1] * 63, max_tokens=50))
    assert run(engine)["a"][-1].stats.generated_tokens == 1


def test_abort_frees_everything_at_once_wherever_the_request_is():
    engine, _, _ = make(max_num_seqs=1, max_num_batched_tokens=4)
    for name in ("running", "waiting"):
        engine.add(request(name))
    engine.step()
    (output,) = engine.abort(["running"])
    assert output.finish_reason is FinishReason.ABORT
    assert engine.stats().blocks_used == 0
    engine.abort(["waiting"])
    assert not engine.has_work
    assert engine.abort(["running", "unknown"]) == []


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on():
    engine, executor, _ = make(max_num_seqs=1)
    engine.add(request("bad"))
    engine.add(request("good"))
    executor.fail_next = RuntimeError("out of luck")
    outputs = run(engine)
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    assert outputs["bad"][-1].error.code == "step_failed"
    assert "out of luck" in outputs["bad"][-1].error.message
    assert outputs["good"][-1].finish_reason is FinishReason.LENGTH
    assert engine.stats().finished == {"error": 1, "length": 1}
    assert engine.stats().blocks_used == 0


def test_content_of_a_failed_step_is_not_reused():
    engine, executor, _ = make()
    engine.add(request("bad"))
    executor.fail_next = RuntimeError("half written")
    run(engine)
    engine.add(request("good"))
    assert run(engine)["good"][-1].cached_tokens == 0


def test_hits_and_queries_are_counted_once_in_tokens():
    engine, _, _ = make(max_num_seqs=1)
    engine.add(request("a"))
    engine.add(request("b"))  # waits, and is not counted while it does
    for _ in range(3):
        engine.step()
    assert engine.stats().prefix_queries == 10
    run(engine)
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (20, 8)
    assert stats.misses == {"cold": 8, "partial_block": 4}
    assert stats.prompt_tokens == 20


def test_recomputation_after_preemption_is_no_hit():
    engine, _, _ = make(num_blocks=12, max_model_len=32, max_num_batched_tokens=32)
    for index in range(3):
        engine.add(request(f"r{index}", prompt=[index + 1] * 9, max_tokens=20, arrival=float(index)))
    outputs = run(engine)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.recomputed_tokens > 0
    assert (stats.prefix_queries, stats.prefix_hits) == (27, 0)
    assert sum(outputs[name][-1].stats.preemptions for name in outputs) == stats.preemptions
    assert all(outputs[name][-1].stats.generated_tokens == 20 for name in outputs)


def test_completions_of_one_prompt_share_its_blocks():
    engine, executor, _ = make(next_token=lambda history: 1 + len(history) % 50)
    engine.add(request("p/0", max_tokens=3))
    for index in (1, 2):
        engine.add(request(f"p/{index}", max_tokens=3, parent="p/0"))
    outputs = run(engine)
    assert [event.action for event in engine.events.of("p/1")].count("fork") == 1
    assert outputs["p/1"][-1].cached_tokens == 9
    computed = sum(plan.tokens for plan in executor.steps)
    assert computed == 10 + 2 + 2 * (1 + 2)


def test_a_child_of_a_parent_that_is_gone_is_served_all_the_same():
    engine, _, _ = make()
    engine.add(request("p/0"))
    engine.add(request("p/1", parent="p/0"))
    engine.abort(["p/0"])
    assert run(engine)["p/1"][-1].finish_reason is FinishReason.LENGTH


def test_prompt_logprobs_are_not_taken_from_the_cache():
    engine, executor, _ = make()
    engine.add(request("a"))
    run(engine)
    engine.add(request("b", params=SamplingParams(max_tokens=1, prompt_logprobs=1)))
    output = run(engine)["b"][-1]
    assert output.cached_tokens == 0
    assert output.stats.misses == {"not_reusable": 10}
    assert executor.steps[-1].rows[0].scored == tuple(range(2, 11))


def test_static_batching_counts_its_padding():
    engine, executor, _ = make(batching="static", max_num_batched_tokens=64)
    engine.add(request("short", prompt=[1] * 4, max_tokens=2))
    engine.add(request("long", prompt=[2] * 10, max_tokens=6))
    engine.step()
    engine.add(request("late", prompt=[3] * 4, max_tokens=1))
    run(engine)
    assert executor.steps[0].padding == 6
    assert [plan.padding for plan in executor.steps[1:6]] == [0, 1, 1, 1, 1]
    assert "late" not in {row.request_id for plan in executor.steps[:6] for row in plan.rows}
    assert engine.stats().padded_tokens == 10


def test_dynamic_batching_waits_for_a_batch_to_fill():
    engine, executor, clock = make(batching="dynamic", max_num_seqs=2, batch_wait_ms=50.0)
    engine.add(request("a", max_tokens=1))
    assert engine.step() == []
    clock.advance(0.06)
    assert len(engine.step()) == 1
    engine.add(request("b", arrival=clock.now))
    engine.add(request("c", arrival=clock.now))
    engine.step()
    assert len(executor.steps[-1].rows) == 2


def test_the_adaptive_budget_follows_the_goal():
    engine, executor, _ = make(policy="adaptive", tpot_goal_ms=20.0, max_num_batched_tokens=64, num_blocks=200)
    for index in range(6):
        engine.add(request(f"r{index}", prompt=[index + 1] * 50, max_tokens=8))
    run(engine)
    sizes = [plan.tokens for plan in executor.steps]
    assert sizes[0] == 64
    assert min(sizes[1:5]) <= 32


def test_progress_is_stamped():
    engine, _, clock = make()
    clock.advance(5)
    engine.add(request())
    assert engine.stats().last_progress == 5
    engine.step()
    assert engine.stats().last_progress == clock.now


traffic = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(POLICIES.names()),
        "batching": st.sampled_from(BATCHING.names()),
        "blocks": st.integers(36, 80),
        "budget": st.integers(4, 40),
        "seqs": st.integers(1, 8),
        "windows": st.sampled_from([(None,), (None, 6), (10,)]),
        "eviction": st.sampled_from(["lru", "lfu", "cost"]),
        "caching": st.booleans(),
        "seed": st.integers(0, 10_000),
        "aborts": st.lists(st.tuples(st.integers(0, 60), st.integers(0, 24)), max_size=8),
        "failures": st.lists(st.integers(0, 60), max_size=3),
    }
)


@settings(max_examples=120, deadline=None)
@given(traffic)
def test_whatever_happens_every_request_ends_once_and_nothing_leaks(case):
    """FakeExecutor checks on each step that every visible KV entry is the row's own: see `tokenmill.testing`."""
    engine, executor, clock = make(
        num_blocks=case["blocks"],
        windows=case["windows"],
        max_model_len=48,
        policy=case["policy"],
        batching=case["batching"],
        max_num_batched_tokens=case["budget"],
        max_num_seqs=case["seqs"],
        cache={"eviction": case["eviction"], "prefix_caching": case["caching"]},
    )
    requests = random_traffic(case["seed"], 25, engine.facts)
    ended: list[str] = []
    step = 0
    while requests or engine.has_work:
        if requests and step % 2 == 0:
            source = requests.pop()
            parent = source.request_id + "-first" if source.priority == 1 else ""
            engine.add(msgspec.structs.replace(source, arrival=clock.now, parent=parent))
            if parent:
                engine.add(msgspec.structs.replace(source, request_id=parent, arrival=clock.now))
        if step in case["failures"]:
            executor.fail_next = RuntimeError("injected")
        before = engine.events.step
        outputs = engine.step()
        for when, which in case["aborts"]:
            if when == step:
                outputs += engine.abort([f"r{which}"])
        ended += [output.request_id for output in outputs if output.finish_reason is not None]
        if engine.events.step == before:
            clock.advance(0.02)
        step += 1
        assert step < 5000
    arrived = [event.request_id for event in engine.events if event.action == "arrive"]
    assert sorted(ended) == sorted(arrived)
    assert all(plan.tokens <= case["budget"] for plan in executor.steps)
    stats = engine.stats()
    assert stats.blocks_used == 0
    assert stats.prefix_hits + sum(stats.misses.values()) == stats.prefix_queries
