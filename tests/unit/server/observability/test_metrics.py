"""GET /metrics: the names that dashboards ask for, with the engine's own numbers."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import httpx2
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tokenmill.engine.config import EngineConfig, SchedulerConfig
from tokenmill.server.call import Call, Outcome
from tokenmill.server.config import ObserveConfig, ServerConfig
from tokenmill.server.observability.engine_metrics import saturation
from tokenmill.server.observability.metrics import Metrics
from tokenmill.types import EngineStats, FinishReason, RequestStats, SamplingParams

Connect = Callable[[ServerConfig], contextlib.AbstractAsyncContextManager[httpx2.AsyncClient]]

REQUEST = RequestStats(
    arrival=10.0,
    scheduled=11.0,
    first_token=13.0,
    finished=19.0,
    prompt_tokens=30,
    generated_tokens=4,
    cached_tokens=16,
    recomputed_tokens=0,
    preemptions=2,
    misses={"cold": 14},
)


def samples(text: bytes) -> dict[tuple[str, str], float]:
    """Values by sample name and the label that is not ``model_name`` or ``engine`` (or empty)."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            own = [value for label, value in sample.labels.items() if label not in ("model_name", "engine")]
            found[sample.name, own[0] if own else ""] = sample.value
    return found


def test_engine_numbers_under_vllms_names(stats: EngineStats) -> None:
    values = samples(Metrics("m", clock=lambda: 92.5).render(stats))
    expected = {
        ("vllm:num_requests_running", ""): 3,
        ("vllm:num_requests_waiting", ""): 2,
        ("vllm:num_requests_waiting_by_reason", "capacity"): 2,
        ("vllm:kv_cache_usage_perc", ""): 0.25,
        ("vllm:prompt_tokens_total", ""): 1000,
        ("vllm:generation_tokens_total", ""): 200,
        ("vllm:prompt_tokens_by_source_total", "local_compute"): 600,
        ("vllm:prompt_tokens_by_source_total", "local_cache_hit"): 400,
        ("vllm:prompt_tokens_cached_total", ""): 400,
        ("vllm:prefix_cache_queries_total", ""): 1000,
        ("vllm:prefix_cache_hits_total", ""): 400,
        ("vllm:num_preemptions_total", ""): 1,
        ("vllm:prompt_tokens_recomputed_total", ""): 0,
        ("vllm:request_success_total", "stop"): 4,
        ("vllm:request_success_total", "error"): 1,
        ("tokenmill:prefix_cache_miss_tokens_total", "cold"): 590,
        ("tokenmill:prefix_cache_miss_tokens_total", "evicted"): 10,
        ("tokenmill:recompute_tokens_total", "preempt"): 32,
        ("tokenmill:padded_tokens_total", ""): 5,
        ("tokenmill:engine_steps_total", ""): 7,
        ("tokenmill:last_progress_seconds", ""): 2.5,
    }
    assert {key: values.get(key) for key in expected} == expected


def test_labels(stats: EngineStats) -> None:
    families = {f.name: f for f in text_string_to_metric_families(Metrics("m").render(stats).decode())}
    assert families["vllm:num_requests_running"].samples[0].labels == {"model_name": "m", "engine": "0"}
    info = families["vllm:cache_config_info"].samples[0]
    assert (info.labels["block_size"], info.labels["num_gpu_blocks"], info.value) == ("16", "100", 1)
    assert families["vllm:time_to_first_token_seconds"].samples[0].labels["model_name"] == "m"


def test_no_work_is_no_hang(stats: EngineStats) -> None:
    idle = msgspec.structs.replace(stats, running=0, waiting=0)
    assert samples(Metrics("m", clock=lambda: 1e6).render(idle))["tokenmill:last_progress_seconds", ""] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vllm:time_to_first_token_seconds", 3.0),
        ("vllm:e2e_request_latency_seconds", 9.0),
        ("vllm:request_queue_time_seconds", 1.0),
        ("vllm:request_inference_time_seconds", 8.0),
        ("vllm:request_prefill_time_seconds", 2.0),
        ("vllm:request_decode_time_seconds", 6.0),
        ("vllm:request_time_per_output_token_seconds", 2.0),
        ("vllm:request_prompt_tokens", 30),
        ("vllm:request_generation_tokens", 4),
        ("vllm:request_params_max_tokens", 50),
        ("vllm:request_prefill_kv_computed_tokens", 14),
        ("vllm:request_num_preemptions", 2),
    ],
)
def test_a_finished_request_is_observed_once(stats: EngineStats, name: str, value: float) -> None:
    metrics = Metrics("m")
    metrics.finished(REQUEST, FinishReason.STOP, SamplingParams(max_tokens=50))
    values = samples(metrics.render(stats))
    assert values[name + "_sum", ""] == value
    assert values[name + "_count", ""] == 1


def test_a_request_that_never_ran_has_no_times_of_running(stats: EngineStats) -> None:
    metrics = Metrics("m")
    lost = msgspec.structs.replace(REQUEST, scheduled=None, first_token=None, generated_tokens=0)
    metrics.finished(lost, FinishReason.ABORT, SamplingParams(max_tokens=None))
    values = samples(metrics.render(stats))
    assert values["vllm:e2e_request_latency_seconds_count", ""] == 1
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds", "request_params_max_tokens"):
        assert values[f"vllm:{name}_count", ""] == 0


def test_steps_and_tokens_are_observed(stats: EngineStats) -> None:
    metrics = Metrics("m")
    metrics.step(stats)
    metrics.tokens("a", 1, None)
    metrics.tokens("a", 1, 0.03)
    values = samples(metrics.render(stats))
    assert values["vllm:iteration_tokens_total_sum", ""] == 48
    assert values["vllm:inter_token_latency_seconds_count", ""] == 1
    assert values["vllm:inter_token_latency_seconds_sum", ""] == pytest.approx(0.03)


async def test_endpoint(http: httpx2.AsyncClient) -> None:
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert samples(answer.content)["vllm:num_requests_running", ""] == 3


TTFT = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
PER_TOKEN = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
REQUEST_S = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
LENGTH = "1 2 5 10 20 50 100 200 500 1000 2000"  # of a model with a context of 2048


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("time_to_first_token_seconds", TTFT),
        ("inter_token_latency_seconds", PER_TOKEN),
        ("request_time_per_output_token_seconds", PER_TOKEN),
        ("e2e_request_latency_seconds", REQUEST_S),
        ("request_queue_time_seconds", REQUEST_S),
        ("request_inference_time_seconds", REQUEST_S),
        ("request_prefill_time_seconds", REQUEST_S),
        ("request_decode_time_seconds", REQUEST_S),
        ("request_prompt_tokens", LENGTH),
        ("request_generation_tokens", LENGTH),
        ("request_max_num_generation_tokens", LENGTH),
        ("request_params_max_tokens", LENGTH),
        ("request_prefill_kv_computed_tokens", LENGTH),
        ("request_params_n", "1 2 5 10 20"),
        ("iteration_tokens_total", "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384"),
    ],
)
def test_buckets_are_vllms(stats: EngineStats, name: str, bounds: str) -> None:
    text = Metrics("m").render(stats).decode()
    found = re.findall(rf'^vllm:{name}_bucket{{.*le="(.*?)".*}}', text, re.MULTILINE)
    assert [float(bound) for bound in found] == [*map(float, bounds.split()), float("inf")]


def test_counters_have_no_name_but_the_one_with_total(stats: EngineStats) -> None:
    names = {name for name, _ in samples(Metrics("m").render(stats))}
    assert "vllm:prompt_tokens_total" in names
    assert "vllm:prompt_tokens" not in names


def test_names_that_vllm_gave_up_are_there_on_request(stats: EngineStats) -> None:
    old = {
        *("vllm:gpu_cache_usage_perc", "vllm:gpu_prefix_cache_queries_total", "vllm:gpu_prefix_cache_hits_total"),
        "vllm:time_per_output_token_seconds_bucket",
    }
    assert not old & {name for name, _ in samples(Metrics("m").render(stats))}
    metrics = Metrics("m", observe=ObserveConfig(legacy_metrics=True))
    metrics.tokens("a", 1, 0.03)
    values = samples(metrics.render(stats))
    assert old <= {name for name, _ in values}
    assert values["vllm:gpu_cache_usage_perc", ""] == values["vllm:kv_cache_usage_perc", ""]
    assert values["vllm:time_per_output_token_seconds_count", ""] == 1
    assert values["vllm:inter_token_latency_seconds_count", ""] == 1


@pytest.mark.parametrize(
    ("changes", "waited", "expected"),
    [
        ({"running": 0, "waiting": 0, "blocks_used": 0}, 9.0, 0.0),
        ({"running": 4, "waiting": 0, "blocks_used": 0}, 9.0, 0.5),
        ({"running": 8, "waiting": 4, "blocks_used": 0}, 0.0, 1.5),
        ({"running": 1, "waiting": 0, "blocks_used": 90}, 0.0, 0.9),
        ({"running": 1, "waiting": 1, "blocks_used": 0}, 4.0, 2.0),
    ],
)
def test_saturation_is_the_tightest_bound(
    stats: EngineStats, changes: dict[str, int], waited: float, expected: float
) -> None:
    state = msgspec.structs.replace(stats, **changes)
    assert saturation(state, max_num_seqs=8, queue_s=waited, goal_s=2.0) == expected


def test_saturation_uses_the_engines_seats(stats: EngineStats) -> None:
    metrics = Metrics("m", EngineConfig(scheduler=SchedulerConfig(max_num_seqs=5)))
    assert samples(metrics.render(stats))["tokenmill:saturation_ratio", ""] == 1.0


def call(n: int = 1) -> Call:
    params = SamplingParams(n=n)
    return Call(request_id="a", endpoint="/v1/completions", model="m", prompt="", params=params)


def outcome(*stats: RequestStats, reason: str = "stop") -> Outcome:
    return Outcome((reason,) * len(stats), "", 30, 16, 4, stats, 9.0)


@pytest.mark.parametrize(
    ("reason", "ttft_ms", "expected"),
    [
        ("stop", 3000, {"ttft": "true", "tpot": "true", "all": "true"}),
        ("stop", 2999, {"ttft": "false", "tpot": "true", "all": "false"}),
        ("error", 3000, {"ttft": "false", "tpot": "false", "all": "false"}),
        ("abort", 3000, {}),
    ],
)
def test_goodput_counts_requests_against_both_goals(
    stats: EngineStats, reason: str, ttft_ms: float, expected: dict[str, str]
) -> None:
    metrics = Metrics("m", observe=ObserveConfig(ttft_slo_ms=ttft_ms, tpot_slo_ms=2000))
    metrics.end(call(), outcome(REQUEST, reason=reason))
    families = {f.name: f for f in text_string_to_metric_families(metrics.render(stats).decode())}
    found = families["tokenmill:goodput_requests"].samples
    assert {each.labels["slo"]: each.labels["met"] for each in found if each.name.endswith("_total")} == expected


def test_completions_of_one_request_are_told_together(stats: EngineStats) -> None:
    metrics = Metrics("m")
    metrics.end(call(n=2), outcome(REQUEST, msgspec.structs.replace(REQUEST, generated_tokens=9)))
    values = samples(metrics.render(stats))
    assert values["vllm:request_params_n_sum", ""] == 2
    assert values["vllm:request_max_num_generation_tokens_sum", ""] == 9


async def test_answers_are_counted_by_route_and_refusals_by_code(http: httpx2.AsyncClient) -> None:
    await http.post("/v1/completions", json={"prompt": "Hi"})
    await http.post("/v1/completions", json={"prompt": "Hi", "model": "other"})
    await http.get("/no/such/place")
    await http.get("/v1/models/scripted")
    text = (await http.get("/metrics")).text
    for line in (
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0',
        'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0',
        'http_requests_total{handler="none",method="GET",status="4xx"} 1.0',
        'http_requests_total{handler="/v1/models/{name:path}",method="GET",status="2xx"} 1.0',
        'http_request_duration_seconds_count{handler="/v1/completions",method="POST"} 2.0',
        'tokenmill:requests_refused_total{code="model_not_found"} 1.0',
        'tokenmill:requests_refused_total{code="not_found"} 1.0',
    ):
        assert line in text.splitlines()


async def test_a_body_that_is_too_large_is_counted(http: httpx2.AsyncClient) -> None:
    await http.post("/v1/completions", content=b"x" * 20_000)
    assert 'requests_refused_total{code="body_too_large"} 1.0' in (await http.get("/metrics")).text


async def test_state_of_the_engine_and_the_server(app: object, llm: object, http: httpx2.AsyncClient) -> None:
    async def state() -> tuple[float, float]:
        values = samples((await http.get("/metrics")).content)
        return values["tokenmill:engine_up", ""], values["tokenmill:draining", ""]

    assert await state() == (1, 0)
    llm.state = dataclasses.replace(llm.state, ok=False)  # type: ignore[attr-defined]
    app.state.lifecycle.draining = True  # type: ignore[attr-defined]
    assert await state() == (0, 1)


def test_restarts_and_the_time_to_start(stats: EngineStats) -> None:
    metrics = Metrics("m")
    metrics.started(2.5)
    values = samples(metrics.render(stats, restarts=1))
    assert values["tokenmill:engine_restarts_total", ""] == 1
    assert values["tokenmill:start_seconds", ""] == 2.5


async def test_the_table_in_the_documentation_lists_what_is_exported(connect: Connect) -> None:
    document = (Path(__file__).parents[4] / "docs" / "observability.md").read_text()
    written = set(re.findall(r"^\| `((?:vllm|tokenmill|http)[\w:]+)`", document, re.MULTILINE))
    async with connect(ServerConfig(observe=ObserveConfig(legacy_metrics=True))) as http:
        text = (await http.get("/metrics")).text
    families = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert written == {name for name in families if not name.startswith("process_") and not name.endswith("_created")}
