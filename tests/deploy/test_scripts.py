"""The notice watcher and the fetching of models, against servers that answer as the clouds do."""

import http.server
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fetch_model
import pytest
import spot_watch

SCRIPTS = Path(spot_watch.__file__).parent


class Cloud(http.server.ThreadingHTTPServer):
    """A metadata service and a tokenmill server in one. `answers` maps "METHOD path" to a body or a status."""

    def __init__(self, answers):
        self.answers, self.seen, self.accepted, self.drained_again = answers, [], 0, threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def _answer(self):
        self.server.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        found = self.server.answers.get(f"{self.command} {self.path}", 404)
        found = found.pop(0) if isinstance(found, list) else found
        status, body = (found, "") if isinstance(found, int) else (200, found)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
        if self.path == "/admin/drain" and status == 200:
            self.server.accepted += 1
            if self.server.accepted == 2:
                self.server.drained_again.set()

    do_GET = do_PUT = do_POST = _answer

    def log_message(self, *_):
        pass


@pytest.fixture
def cloud():
    started = []

    def start(answers):
        server = Cloud(answers)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


AZURE_EVENTS = "GET /metadata/scheduledevents?api-version=2020-07-01"
AZURE_NAME = "GET /metadata/instance/compute/name?api-version=2021-02-01&format=text"
TOKEN = "PUT /latest/api/token"
ACTION = "GET /latest/meta-data/spot/instance-action"
PREEMPTED = "GET /computeMetadata/v1/instance/preempted"


def _event(kind, machine):
    return json.dumps({"Events": [{"EventType": kind, "Resources": [machine]}]})


@pytest.mark.parametrize(
    ("provider", "answers", "expected"),
    [
        ("aws", {TOKEN: "t", ACTION: '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'}, True),
        ("aws", {TOKEN: "t", ACTION: 404}, False),
        ("aws", {TOKEN: 403}, False),
        ("gcp", {PREEMPTED: "TRUE"}, True),
        ("gcp", {PREEMPTED: "FALSE"}, False),
        ("gcp", {PREEMPTED: 503}, False),
        ("azure", {AZURE_EVENTS: _event("Preempt", "me"), AZURE_NAME: "me"}, True),
        ("azure", {AZURE_EVENTS: _event("Preempt", "another"), AZURE_NAME: "me"}, False),
        ("azure", {AZURE_EVENTS: _event("Freeze", "me"), AZURE_NAME: "me"}, False),
        ("azure", {AZURE_EVENTS: '{"Events": []}', AZURE_NAME: "me"}, False),
        ("azure", {AZURE_EVENTS: "not json", AZURE_NAME: "me"}, False),
    ],
)
def test_a_notice_is_read_as_the_cloud_gives_it(cloud, provider, answers, expected):
    assert spot_watch.noticed(provider, cloud(answers).url) is expected


def test_metadata_is_asked_with_the_headers_that_the_clouds_insist_on(cloud):
    server = cloud({TOKEN: "the-token", PREEMPTED: "FALSE", AZURE_EVENTS: "{}", AZURE_NAME: "me"})
    for provider in spot_watch.PROVIDERS:
        spot_watch.noticed(provider, server.url)
    headers = {path.partition("?")[0]: headers for _, path, headers in server.seen}
    assert headers["/latest/api/token"]["x-aws-ec2-metadata-token-ttl-seconds"] == "60"
    assert headers["/latest/meta-data/spot/instance-action"]["x-aws-ec2-metadata-token"] == "the-token"
    assert headers["/computeMetadata/v1/instance/preempted"]["metadata-flavor"] == "Google"
    assert headers["/metadata/scheduledevents"]["metadata"] == "true"


def test_no_metadata_service_is_no_notice():
    assert spot_watch.noticed("aws", "http://127.0.0.1:9") is False


def test_the_watcher_keeps_the_server_draining_and_ends_on_sigterm(cloud):
    # No notice, no notice, a notice; the server refuses once, drains, ends, and is started again.
    drains = [503, "{}", 503, "{}", *["{}"] * 10_000]
    server = cloud({PREEMPTED: ["FALSE", "FALSE", "TRUE"], "POST /admin/drain": drains})
    command = [sys.executable, str(SCRIPTS / "spot_watch.py"), "gcp", "--metadata", server.url]
    command += ["--drain-url", f"{server.url}/admin/drain", "--interval-s", "0.01"]
    with subprocess.Popen(
        command, env={"ADMIN_KEY": "secret"}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:  # nobody reads what it says thousands of times
        try:
            assert server.drained_again.wait(30)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    asked = [path for _, path, _ in server.seen]
    assert asked[:3] == ["/computeMetadata/v1/instance/preempted"] * 3
    assert set(asked[3:]) == {"/admin/drain"}
    assert {headers.get("authorization") for _, path, headers in server.seen[3:]} == {"Bearer secret"}


class _Hub:
    """huggingface_hub's one function that is used."""

    def __init__(self, works):
        self.works, self.calls = works, []

    def snapshot_download(self, repo, *, revision, local_dir, allow_patterns):
        self.calls.append((repo, revision, local_dir, tuple(allow_patterns)))
        local_dir.mkdir(exist_ok=True)
        if not self.works:
            raise OSError("cut off")


def test_a_model_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := _Hub(works=True))
    folder = tmp_path / "model"
    assert fetch_model.fetch("org/name", "v1", folder) is True
    assert fetch_model.fetch("org/name", "v1", folder) is False
    assert hub.calls == [("org/name", "v1", folder, tuple(fetch_model.FILES))]


def test_a_fetch_that_was_cut_off_is_not_complete(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub(works=False))
    with pytest.raises(OSError, match="cut off"):
        fetch_model.fetch("org/name", "v1", tmp_path / "model")
    assert not (tmp_path / "model" / ".complete").exists()


def test_what_is_fetched_is_what_the_server_reads():
    from tokenmill.models import folder

    assert fetch_model.FILES == folder._FILES
