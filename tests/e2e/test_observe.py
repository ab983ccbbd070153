"""A real server that is watched and filtered: its log, its traces at a collector, and its metrics."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import psutil
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import running_server

MARK = "xyzzy-plugh"
TRACE, PARENT = "ab" * 16, "cd" * 8


class _Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        self.server.spans += [s for r in sent.resource_spans for scope in r.scope_spans for s in scope.spans]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Collector) as server:
        server.spans = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_crash_tells_nothing_that_people_wrote(tmp_path):
    flags = ("--log-format", "json", "--log-level", "debug", "--state", str(tmp_path))
    body = {"prompt": f"{MARK} {MARK}", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with (tmp_path / "log").open("w+") as log:
        with running_server("demo", *flags, stderr=log) as server, httpx2.Client(base_url=server.url) as http:
            with http.stream("POST", "/v1/completions", json=body) as answer:
                parts = answer.iter_text()
                next(parts)
                for engine in psutil.Process(server.process.pid).children():
                    engine.kill()
                assert "engine_died" in "".join(parts)
            assert server.stop() == 0
        log.seek(0)
        text = log.read()
    [report] = (tmp_path / "crashes").iterdir()
    assert MARK not in report.read_text()
    assert MARK not in text
    assert "engine_died" in text
    assert all(json.loads(line) for line in text.splitlines())


def test_a_watched_server(collector, tmp_path):
    flags = (
        *("--log-format", "json", "--log-level", "debug", "--legacy-metrics", "--ttft-slo-ms", "60000"),
        *("--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}/v1/traces", "--filters", "pii"),
    )
    with (tmp_path / "log").open("w+") as log:
        with running_server("demo", *flags, stderr=log) as server, httpx2.Client(base_url=server.url) as http:
            answer = http.post(
                "/v1/chat/completions",
                json={"messages": [{"role": "user", "content": f"{MARK} a@b.de {MARK}"}], "max_tokens": 8},
                headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"},
            )
            assert answer.status_code == 200
            assert http.post("/v1/completions", json={"prompt": MARK, "max_tokens": MARK}).status_code == 400
            metrics = http.get("/metrics").text
            assert server.stop() == 0
        log.seek(0)
        text = log.read()
    lines = [json.loads(line) for line in text.splitlines()]
    assert MARK not in text

    done, refused = [line for line in lines if line["message"] == "request" and line["level"] == "info"]
    assert (done["request_id"], done["trace_id"], done["finish"]) == ("mine", TRACE, "length")
    assert (done["generated_tokens"], done["prompt_tokens"]) == (8, answer.json()["usage"]["prompt_tokens"])
    assert 0 <= done["queue_ms"] <= done["ttft_ms"] <= done["total_ms"]
    assert refused["error_code"] == "invalid_parameter"
    assert {"ready", "shutting down"} <= {line["message"] for line in lines}

    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    assert spans.keys() == {"chat demo", "queue", "prefill", "decode"}
    root = spans["chat demo"]
    assert root.parent_span_id.hex() == PARENT
    queue, prefill, decode = spans["queue"], spans["prefill"], spans["decode"]
    slack = 5_000_000  # the wall clock is read once, and may have been corrected since
    times = [root.start_time_unix_nano - slack, queue.start_time_unix_nano, queue.end_time_unix_nano]
    times += [prefill.end_time_unix_nano, decode.end_time_unix_nano, root.end_time_unix_nano + slack]
    assert times == sorted(times)
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano

    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    assert values["vllm:generation_tokens_total", "0", "demo"] == 8
    assert values["vllm:request_params_n_count", "0", "demo"] == 1
    assert values["tokenmill:goodput_requests_total", "0", "all", "demo", "true"] == 1
    assert values["tokenmill:engine_up", "0", "demo"] == 1
    assert values["tokenmill:start_seconds",] > 0
    assert ("vllm:gpu_cache_usage_perc", "0", "demo") in values
