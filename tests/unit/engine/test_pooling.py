"""Embeddings through the engine with a fake executor, which pools the tokens it has seen instead of states."""

from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.plan import PoolRow
from tokenmill.engine.pooler import pool
from tokenmill.errors import RequestError
from tokenmill.testing import FakeClock, FakeExecutor, fake_facts
from tokenmill.types import EngineRequest, FinishReason, PoolingParams, SamplingParams


def make(num_blocks=64, budget=8):
    clock = FakeClock()
    executor = FakeExecutor(fake_facts(num_blocks, 4, 64), clock=clock)
    values = {"scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": budget}, "cache": {"block_size": 4}}
    return Engine(build(EngineConfig, values), executor, clock), executor


def embedding(name="e", prompt=range(1, 22), **params) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=list(prompt), params=SamplingParams(max_tokens=None), arrival=0.0,
        pooling=PoolingParams(**params),
    )  # fmt: skip


def completion(name, prompt, max_tokens=5) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens)
    return EngineRequest(request_id=name, prompt_token_ids=list(prompt), params=params, arrival=0.0)


def run(engine: Engine) -> dict[str, list]:
    outputs: dict[str, list] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def seen(output) -> list[int]:
    return list(array("q", output.embedding))


def test_an_embedding_comes_once_with_the_end_and_no_token_is_sampled():
    engine, executor = make()
    engine.add(embedding())
    (output,) = run(engine)["e"]
    assert output.finish_reason is FinishReason.STOP
    assert output.token_ids == []
    assert (output.stats.prompt_tokens, output.stats.generated_tokens) == (21, 0)
    assert all(row.sample is None for plan in executor.steps for row in plan.rows)
    assert engine.stats().blocks_used == 0
    assert engine.stats().finished == {"stop": 1}


def test_a_mean_sees_every_token_once_however_it_is_cut():
    engine, _ = make(budget=5)
    engine.add(embedding(pooling="mean"))
    assert seen(run(engine)["e"][0]) == list(range(1, 22))


def test_the_last_token_can_use_what_is_cached_and_a_mean_cannot():
    engine, _ = make()
    engine.add(completion("first", range(1, 22)))
    run(engine)
    engine.add(embedding("last"))
    engine.add(embedding("mean", pooling="mean"))
    outputs = run(engine)
    assert outputs["last"][0].cached_tokens == 20
    assert seen(outputs["last"][0])[-1] == 21
    assert outputs["mean"][0].cached_tokens == 0
    assert outputs["mean"][0].stats.misses == {"not_reusable": 21}
    assert seen(outputs["mean"][0]) == list(range(1, 22))


def test_what_an_embedding_computed_is_found_by_others():
    engine, _ = make()
    engine.add(embedding(pooling="mean"))
    run(engine)
    engine.add(completion("after", range(1, 22)))
    assert run(engine)["after"][-1].cached_tokens == 20


def test_a_preempted_mean_begins_anew():
    engine, _ = make(budget=6)
    engine.add(embedding(pooling="mean"))
    engine.step()
    engine.step()
    engine.scheduler.preempt(engine.scheduler.running["e"], "the test")
    (output,) = run(engine)["e"]
    assert output.stats.preemptions == 1
    assert seen(output) == list(range(1, 22))


def test_a_prompt_may_fill_the_whole_context_since_no_answer_follows():
    engine, _ = make()
    engine.add(embedding(prompt=[1] * 64))
    assert run(engine)["e"][0].finish_reason is FinishReason.STOP
    with pytest.raises(RequestError, match="at most 64 fit") as refused:
        engine.add(embedding(prompt=[1] * 65))
    assert refused.value.code == "prompt_too_long"


def test_more_dimensions_than_the_model_has_are_refused():
    engine, _ = make()
    with pytest.raises(RequestError, match="between 1 and 8") as refused:
        engine.add(embedding(dimensions=9))
    assert (refused.value.code, refused.value.field) == ("invalid_parameter", "dimensions")
    assert not engine.has_work


def test_an_embedding_can_be_given_up():
    engine, _ = make()
    engine.add(embedding(pooling="mean"))
    engine.step()
    (output,) = engine.abort(["e"])
    assert (output.finish_reason, output.embedding) == (FinishReason.ABORT, b"")
    assert engine.stats().blocks_used == 0


@pytest.mark.parametrize(("field", "value"), [("pooling", "cls"), ("dimensions", 0)])
def test_a_pooling_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(RequestError) as refused:
        PoolingParams(**{field: value})
    assert (refused.value.code, refused.value.field) == ("invalid_parameter", field)


def pooled(hidden, cuts, **params) -> bytes:
    """Pools states [T, H] in chunks that end at `cuts`."""
    total, start = b"", 0
    for end in [*cuts, len(hidden)]:
        row = PoolRow(PoolingParams(**params), total, len(hidden), end == len(hidden))
        total, start = pool(hidden[start:end], row), end
    return total


@settings(deadline=None)
@given(st.sets(st.integers(1, 29)), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_a_mean_is_bit_equal_however_it_is_cut(cuts, dtype, normalize):
    hidden = torch.randn(30, 7, generator=torch.Generator().manual_seed(3)).to(dtype)
    whole = pooled(hidden, [], pooling="mean", normalize=normalize)
    assert pooled(hidden, sorted(cuts), pooling="mean", normalize=normalize) == whole
    expected = hidden.double().mean(0)
    expected = expected / expected.norm() if normalize else expected
    np.testing.assert_allclose(np.frombuffer(whole, np.float32), expected.numpy(), rtol=1e-6)


def test_dimensions_are_cut_before_the_length_is_one():
    hidden = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    short = np.frombuffer(pooled(hidden, [2], dimensions=3), np.float32)
    assert len(short) == 3
    np.testing.assert_allclose(np.linalg.norm(short), 1, rtol=1e-6)
    np.testing.assert_allclose(short, hidden[-1, :3] / hidden[-1, :3].norm(), rtol=1e-6)


def test_a_state_of_zeros_has_no_direction_and_stays_zero():
    assert not np.frombuffer(pooled(torch.zeros(3, 5), []), np.float32).any()
