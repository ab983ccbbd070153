"""LLM and AsyncLLM on a tiny random model: what users of vLLM expect, and that nothing is left behind."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import threading
import time

import pytest

from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.crash import NO_REPORTS, Reports
from tokenmill.errors import EngineError, ModelError, RequestError, UnavailableError
from tokenmill.llm import LLM, AsyncLLM
from tokenmill.types import FinishReason, PoolingParams, SamplingParams


def config(path, **scheduler) -> EngineConfig:
    return build(EngineConfig, {"model": {"model": str(path)}, "scheduler": scheduler})


@pytest.fixture(scope="module")
def llm(tiny_model_path):
    return LLM(config=config(tiny_model_path))


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_prompts_of_every_form(llm):
    text = llm.generate("hello", GREEDY)[0]
    ids = llm.tokenizer.encode("hello")
    assert text.prompt == "hello"
    assert text.prompt_token_ids == ids
    for prompt in (ids, {"prompt": "hello"}, {"prompt_token_ids": ids}, ["hello"], [ids]):
        (output,) = llm.generate(prompt, GREEDY)
        assert output.outputs[0].token_ids == text.outputs[0].token_ids
        assert output.finished
        assert output.outputs[0].finish_reason is FinishReason.LENGTH


def test_outputs_keep_the_order_of_the_prompts(llm):
    prompts = ["a" * length for length in (40, 3, 20)]
    together = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in together] == prompts
    assert [output.outputs[0].text for output in together] == [
        llm.generate(prompt, GREEDY)[0].outputs[0].text for prompt in prompts
    ]


def test_n_completions_with_a_seed(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=8, temperature=1.0, ignore_eos=True)
    first, second = llm.generate(["story", "story"], params)
    assert [c.index for c in first.outputs] == [0, 1, 2]
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in second.outputs]
    assert len({tuple(c.token_ids) for c in first.outputs}) == 3
    assert len(first.stats) == 3


def test_a_stop_string_ends_the_text_before_it(llm):
    whole = llm.generate("hello", GREEDY)[0].outputs[0]
    stop = whole.text[3:5]
    cut = llm.generate("hello", SamplingParams(temperature=0, max_tokens=12, stop=stop, ignore_eos=True))[0]
    assert cut.outputs[0].text == whole.text[: whole.text.index(stop)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == (FinishReason.STOP, stop)
    assert llm.engine.stats().blocks_used == 0


def test_logprobs_and_prompt_logprobs(llm):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    (output,) = llm.generate("hello", params)
    completion = output.outputs[0]
    assert len(completion.logprobs) == len(completion.token_ids) == 4
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry.token_ids[0] == token
        assert entry.rank == 1
        assert entry.logprobs[1:] == sorted(entry.logprobs[1:], reverse=True)
        assert len(entry.token_ids) == 4
    assert output.prompt_logprobs[0] is None
    assert [entry.token_ids[0] for entry in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]


def test_bad_and_allowed_words(llm):
    free = llm.generate("hello", GREEDY)[0].outputs[0].text
    word = next(char for char in free if char.isascii() and char.isalpha())
    params = SamplingParams(temperature=0, max_tokens=12, bad_words=[word], ignore_eos=True)
    assert word not in llm.generate("hello", params)[0].outputs[0].text
    allowed = SamplingParams(temperature=0, max_tokens=6, allowed_token_ids=[5, 6], ignore_eos=True)
    assert set(llm.generate("hello", allowed)[0].outputs[0].token_ids) <= {5, 6}


def test_chat_uses_the_template(llm):
    (output,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY)
    assert llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    two = llm.chat([[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]], GREEDY)
    assert len(two) == 2


def test_a_closed_stream_leaves_nothing_behind(llm):
    stream = llm.stream("hello", GREEDY)
    next(stream)
    assert llm.engine.stats().blocks_used > 0
    stream.close()
    assert llm.engine.stats().blocks_used == 0
    assert not llm.engine.has_work


def test_a_stream_adds_up(llm):
    pieces = list(llm.stream("hello", GREEDY))
    assert "".join(piece.outputs[0].text for piece in pieces) == llm.generate("hello", GREEDY)[0].outputs[0].text
    assert pieces[-1].finished


def test_a_bad_prompt_in_a_list_refuses_the_call_and_frees_the_others(llm):
    with pytest.raises(RequestError) as refused:
        llm.generate(["fine", ""], GREEDY)
    assert refused.value.code == "empty_prompt"
    assert not llm.engine.has_work


def test_a_model_that_is_not_there():
    with pytest.raises(ModelError) as error:
        LLM("/no/such/folder")
    assert error.value.code == "model_not_found"


@contextlib.asynccontextmanager
async def started(path, crash_dir=None, **options):
    reports = Reports(crash_dir, 20) if crash_dir else NO_REPORTS
    llm = await AsyncLLM.start(build(EngineConfig, {"model": {"model": str(path)}, **options}), reports=reports)
    try:
        yield llm
    finally:
        await llm.close()


async def collect(llm, prompt, params=GREEDY, **fields):
    return [output async for output in llm.generate(prompt, params, **fields)]


async def until_idle(llm):
    """Steps are reported as they end; the last one reports that all blocks are free."""
    async with asyncio.timeout(20):
        while llm.stats.blocks_used or llm.stats.running or llm.stats.waiting:
            await collect(llm, "x", SamplingParams(max_tokens=1))


async def test_async_agrees_with_sync_and_deltas_add_up(tiny_model_path, llm):
    expected = llm.generate("hello", GREEDY)[0].outputs[0]
    async with started(tiny_model_path) as engine:
        assert engine.max_model_len == 512
        whole, deltas = await asyncio.gather(collect(engine, "hello"), collect(engine, "hello", delta=True))
        assert whole[-1].outputs[0].token_ids == expected.token_ids
        assert "".join(item.outputs[0].text for item in deltas) == expected.text
        assert [item.finished for item in deltas].count(True) == 1
        assert deltas[-1].stats[0].generated_tokens == 12
        events = await engine.events(whole[-1].request_id)
        assert [event.action for event in events][-1] == "finish"
        assert engine.health().ok


async def test_closing_a_stream_aborts_the_request(tiny_model_path):
    async with started(tiny_model_path) as engine:
        endless = engine.generate("hello", SamplingParams(max_tokens=None, ignore_eos=True), request_id="endless")
        await anext(endless)
        await endless.aclose()
        await until_idle(engine)
        assert engine.stats.finished["abort"] == 1


async def test_refusals_come_before_the_first_item(tiny_model_path):
    async with started(tiny_model_path) as engine:
        with pytest.raises(RequestError) as refused:
            await collect(engine, [1] * 600)
        assert refused.value.code == "prompt_too_long"
        running = engine.generate("hello", SamplingParams(max_tokens=None, ignore_eos=True), request_id="same")
        await anext(running)
        with pytest.raises(RequestError, match="under way"):
            await collect(engine, "hello", request_id="same")
        await running.aclose()


async def test_drain_lets_running_requests_finish_and_refuses_new_ones(tiny_model_path):
    async with started(tiny_model_path) as engine:
        running = asyncio.create_task(collect(engine, "hello", SamplingParams(max_tokens=200, ignore_eos=True)))
        while not engine.stats.running:
            await asyncio.sleep(0.001)
        drained = asyncio.create_task(engine.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError):
            await collect(engine, "late")
        await drained
        assert (await running)[-1].stats[0].generated_tokens == 200


async def test_drain_gives_up_after_its_time(tiny_model_path):
    async with started(tiny_model_path) as engine:
        endless = engine.generate("hello", SamplingParams(max_tokens=None, ignore_eos=True))
        await anext(endless)
        await engine.drain(0.0)
        items = [item async for item in endless]
        assert items[-1].outputs[0].finish_reason in (FinishReason.ABORT, FinishReason.LENGTH)


ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)


async def until_ready(llm):
    async with asyncio.timeout(60):
        while not llm.health().ok:
            await asyncio.sleep(0.01)


async def test_a_crash_is_written_down_although_the_server_ends_at_once(tiny_model_path, tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Reports):
        def write(self, *arguments, **more):
            begun.set()
            go_on.wait(20)
            return super().write(*arguments, **more)

    engine = await AsyncLLM.start(config(tiny_model_path), reports=Slow(tmp_path, 20))
    os.kill(engine._engine._client.pid, signal.SIGKILL)
    await asyncio.to_thread(begun.wait, 20)
    closing = asyncio.create_task(engine.close())
    ended, _ = await asyncio.wait((closing,), timeout=2)
    assert not ended, "it does not wait for the report"
    go_on.set()
    await closing
    [report] = tmp_path.iterdir()
    assert "SIGKILL" in report.read_text()


async def test_the_death_of_the_engine_reaches_every_request_and_it_comes_back(tiny_model_path, tmp_path):
    async with started(tiny_model_path, crash_dir=tmp_path) as engine:
        endless = [engine.generate(text, ENDLESS, request_id=text) for text in ("a", "b")]
        for stream in endless:
            await anext(stream)
        os.kill(engine._engine._client.pid, signal.SIGKILL)
        for stream in endless:
            with pytest.raises(EngineError) as died:
                async for _ in stream:
                    pass
            assert died.value.code == "engine_died"
            assert "SIGKILL" in died.value.message
        health = engine.health()
        assert (health.ok, health.phase) == (False, "restarting")
        with pytest.raises(UnavailableError) as refused:
            await collect(engine, "meanwhile")
        assert refused.value.code == "engine_restarting"
        assert refused.value.retry_after_s >= 1
        await until_ready(engine)
        assert engine.health().restarts == 1
        assert (await collect(engine, "after"))[-1].finished

    [file] = tmp_path.glob("crash-*.json")
    report = json.loads(file.read_text())
    assert report["ended_by"] == "SIGKILL"
    assert report["requests"].keys() == {"a", "b"}
    assert all(request["prompt_tokens"] == 1 for request in report["requests"].values())
    assert {event["request_id"] for event in report["events"] if event["action"] == "admit"} == {"a", "b"}
    assert report["config"]["model.model"] == str(tiny_model_path)


async def test_an_engine_that_hangs_is_killed_and_comes_back(tiny_model_path, tmp_path):
    async with started(tiny_model_path, crash_dir=tmp_path, hang_timeout_s=0.5) as engine:
        endless = engine.generate("a", ENDLESS)
        await anext(endless)
        os.kill(engine._engine._client.pid, signal.SIGSTOP)
        with pytest.raises(EngineError) as died:
            async for _ in endless:
                pass
        assert died.value.code == "engine_died"
        assert "No step has ended" in died.value.message
        await until_ready(engine)
        assert (await collect(engine, "after"))[-1].finished
    [file] = tmp_path.glob("crash-*.json")
    report = json.loads(file.read_text())
    assert report["ended_by"] == "SIGABRT"
    assert "in step" in report["stacks"] or "in run" in report["stacks"]


async def test_an_engine_that_does_not_come_back_says_why(tiny_model_path, tmp_path):
    model = shutil.copytree(tiny_model_path, tmp_path / "model")
    async with started(model) as engine:
        (model / "config.json").write_text("{")
        os.kill(engine._engine._client.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while "does not come back" not in engine.health().reason:
                await asyncio.sleep(0.01)
        with pytest.raises(UnavailableError, match="does not come back"):
            await collect(engine, "meanwhile")


async def test_a_deadline_ends_a_request_wherever_it_is(tiny_model_path):
    async with started(tiny_model_path, scheduler={"max_num_seqs": 1}) as engine:
        soon = time.monotonic() + 0.1
        running, waiting = await asyncio.gather(
            collect(engine, "a", ENDLESS, deadline=soon), collect(engine, "b", ENDLESS, deadline=time.monotonic())
        )
        for outputs in (running, waiting):
            [completion] = outputs[-1].outputs
            assert (completion.finish_reason, completion.error.code) == (FinishReason.ERROR, "deadline_exceeded")
        assert not waiting[-1].outputs[0].token_ids


async def test_a_full_queue_refuses_and_says_when_to_come_back(tiny_model_path):
    async with started(tiny_model_path, scheduler={"max_num_seqs": 1, "max_waiting": 1}) as engine:
        running = engine.generate("a", ENDLESS)
        await anext(running)
        waiting = asyncio.create_task(collect(engine, "b", SamplingParams(max_tokens=1)))
        while not engine.stats.waiting:
            await anext(running)
        assert engine.health().full
        with pytest.raises(UnavailableError) as refused:
            await collect(engine, "c")
        assert refused.value.code == "queue_full"
        assert refused.value.retry_after_s >= 1
        await running.aclose()
        assert (await waiting)[-1].finished


async def test_a_caller_that_does_not_fetch_gets_everything_in_one_piece(tiny_model_path, llm):
    expected = llm.generate("hello", GREEDY)[0].outputs[0]
    async with started(tiny_model_path) as engine:
        stream = engine.generate("hello", GREEDY, delta=True)
        pieces = [await anext(stream)]
        while engine.stats.running or not engine.stats.finished:
            await asyncio.sleep(0.001)
        pieces += [piece async for piece in stream]
        assert len(pieces) == 2
        assert "".join(piece.outputs[0].text for piece in pieces) == expected.text
        assert [token for piece in pieces for token in piece.outputs[0].token_ids] == expected.token_ids
        assert pieces[-1].outputs[0].finish_reason is FinishReason.LENGTH


async def test_an_engine_that_cannot_start_says_why(tiny_model_path):
    bad = build(
        EngineConfig, {"model": {"model": str(tiny_model_path), "max_model_len": 512}, "cache": {"memory_gib": 1e-6}}
    )
    with pytest.raises(Exception, match="KV memory") as error:
        await AsyncLLM.start(bad)
    assert error.value.code == "kv_memory_too_small"


async def test_embeddings_are_the_same_from_the_other_process(tiny_model_path, llm):
    expected = [output.embedding for output in llm.embed(["hello", "world"])]
    assert expected[0].typecode == "f"
    assert len(expected[0]) == 48
    async with started(tiny_model_path) as engine:
        outputs = await asyncio.gather(engine.embed("hello"), engine.embed("world"))
        assert [output.embedding for output in outputs] == expected
        assert outputs[0].outputs[0].finish_reason is FinishReason.STOP
        assert (outputs[0].outputs[0].token_ids, outputs[0].finished) == ([], True)
        with pytest.raises(RequestError) as refused:
            await engine.embed("hello", PoolingParams(dimensions=1000))
        assert refused.value.field == "dimensions"


def test_a_bad_text_to_embed_refuses_the_call_and_frees_the_others(llm):
    with pytest.raises(RequestError) as refused:
        llm.embed(["fine", ""])
    assert refused.value.code == "empty_prompt"
    assert not llm.engine.has_work


def test_the_option_says_what_an_embedding_is_made_of(tiny_model_path, llm):
    mean = LLM(config=build(EngineConfig, {"model": {"model": str(tiny_model_path), "pooling": "mean"}}))
    (output,) = mean.embed("hello")
    assert output.embedding == llm.embed("hello", PoolingParams(pooling="mean"))[0].embedding
    assert output.embedding != llm.embed("hello")[0].embedding
