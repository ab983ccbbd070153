"""GET /metrics: the names that dashboards ask for, with the engine's own numbers."""

import httpx2
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tokenmill.server.metrics import Metrics
from tokenmill.types import EngineStats, FinishReason, RequestStats, SamplingParams

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
