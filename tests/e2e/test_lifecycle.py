"""A real server when things go wrong: its engine dies or hangs, it is told to end, it is asked for too much."""

import asyncio
import contextlib
import json
import re
import signal
import ssl
import subprocess
import sys

import httpx2
import openai
import psutil
import pytest
from tests.e2e.conftest import running_server

ENDLESS = {"ignore_eos": True}


def engine_of(process: subprocess.Popen) -> psutil.Process:
    """The engine process of a server, as soon as there is one."""
    while True:
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "tokenmill.engine.process" in child.cmdline():
                    return child


def clients(url: str, **options):
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **options)


async def stream(client, begun: asyncio.Queue, tokens: int = 1500) -> str:
    """Streams a completion; returns its finish reason or the code of its error."""
    try:
        events = await client.completions.create(
            model="demo", prompt="The", max_tokens=tokens, stream=True, extra_body=ENDLESS
        )
        reason = None
        async for chunk in events:
            begun.put_nowait(None)
            reason = chunk.choices[0].finish_reason or reason
        return reason
    except openai.APIError as error:
        return error.code


async def whole(client) -> tuple[int, str]:
    """A completion at once; returns the status and the code of its error."""
    try:
        await client.completions.create(model="demo", prompt="Once", max_tokens=1500, extra_body=ENDLESS)
    except openai.APIStatusError as error:
        return error.status_code, error.code
    return 200, ""


async def until_ready(http) -> None:
    async with asyncio.timeout(60):
        while (await http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_an_engine_that_is_lost_in_flight(tmp_path, number):
    flags = ("--served-model-name", "demo", "--state", str(tmp_path), "--hang-timeout-s", "2")
    with running_server("demo", *flags) as server:
        async with clients(server.url) as client, httpx2.AsyncClient(base_url=server.url) as http:
            begun: asyncio.Queue = asyncio.Queue()
            streams = [asyncio.create_task(stream(client, begun)) for _ in range(8)]
            answers = [asyncio.create_task(whole(client)) for _ in range(4)]
            while (await http.get("/health")).json()["running"] < 12:
                pass
            engine = engine_of(server.process)
            engine.send_signal(number)
            assert await asyncio.gather(*streams) == ["engine_died"] * 8
            assert await asyncio.gather(*answers) == [(500, "engine_died")] * 4
            ready = await http.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (503, "restarting")
            assert (await http.get("/livez")).status_code == 200
            refused = await http.post("/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_restarting")
            assert int(refused.headers["retry-after"]) >= 1
            await until_ready(http)
            assert not engine.is_running()
            assert await stream(client, begun, tokens=5) == "length"
            metrics = (await http.get("/metrics")).text
            assert re.search(r"^tokenmill:engine_restarts_total\{.*\} 1\.0$", metrics, re.MULTILINE)
        assert server.stop() == 0
    [file] = (tmp_path / "crashes").glob("crash-*.json")
    report = json.loads(file.read_text())
    assert len(report["requests"]) == 12
    assert {event["action"] for event in report["events"]} >= {"arrive", "admit", "chunk"}
    assert "The" not in {event["request_id"] for event in report["events"]}
    if number == signal.SIGSTOP:
        assert report["ended_by"] == "SIGABRT"
        assert "engine/process.py" in report["stacks"]


async def test_sigterm_under_load_lets_what_runs_finish_and_refuses_the_rest():
    with running_server("demo", "--served-model-name", "demo") as server:
        async with clients(server.url) as client, httpx2.AsyncClient(base_url=server.url) as http:
            begun: asyncio.Queue = asyncio.Queue()
            running = [asyncio.create_task(stream(client, begun, tokens=400)) for _ in range(16)]
            while (await http.get("/health")).json()["running"] < 16:
                pass
            server.process.send_signal(signal.SIGTERM)
            while (answer := await http.get("/readyz")).status_code == 200:
                pass
            assert answer.json()["status"] == "draining"
            assert (await whole(client)) == (503, "shutting_down")
            assert await asyncio.gather(*running) == ["length"] * 16
        assert server.process.wait(60) == 0


async def test_a_second_signal_cuts_off_what_runs():
    with running_server("demo", "--served-model-name", "demo", "--max-num-seqs", "1") as server:
        async with clients(server.url) as client, httpx2.AsyncClient(base_url=server.url) as http:
            begun: asyncio.Queue = asyncio.Queue()
            running = [asyncio.create_task(stream(client, begun)) for _ in range(8)]
            await begun.get()
            server.process.send_signal(signal.SIGTERM)
            while (await http.get("/readyz")).status_code == 200:
                pass
            server.process.send_signal(signal.SIGTERM)
            assert "shutting_down" in await asyncio.gather(*running)
        assert server.process.wait(60) == 0


async def test_a_drain_by_the_admin_endpoint_ends_the_process_when_it_is_idle():
    with running_server("demo", "--served-model-name", "demo") as server:
        async with clients(server.url) as client, httpx2.AsyncClient(base_url=server.url) as http:
            begun: asyncio.Queue = asyncio.Queue()
            running = asyncio.create_task(stream(client, begun, tokens=400))
            await begun.get()
            assert (await http.post("/admin/drain")).status_code == 202
            assert (await http.get("/readyz")).json()["status"] == "draining"
            assert await whole(client) == (503, "shutting_down")
            assert await running == "length"
        assert server.process.wait(60) == 0


@contextlib.contextmanager
def starting(model: str, *flags: str):
    """A server that may not be ready yet."""
    command = [sys.executable, "-m", "tokenmill", "serve", model, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_probes_while_the_model_loads(tmp_path):
    path = tmp_path / "socket"
    with starting("demo", "--uds", str(path)) as process:
        engine = engine_of(process)
        engine.suspend()  # so that it loads for as long as we like
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://server") as http:
            startup = http.get("/startupz")
            assert (startup.status_code, startup.json()["status"]) == (503, "starting")
            assert startup.json()["phase"] in ("weights", "memory")
            assert http.get("/livez").status_code == 200
            assert http.get("/readyz").json()["status"] == "starting"
            refused = http.post("/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "starting")
            assert refused.headers["retry-after"]
            engine.resume()
            assert process.stdout.readline() == f"Serving demo on unix:{path}\n"
            assert [http.get(probe).status_code for probe in ("/startupz", "/livez", "/readyz")] == [200] * 3
            assert http.get("/startupz").json() == {"status": "ok", "phase": "ready", "percent": 100.0}
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not path.exists()


def test_a_model_that_cannot_be_loaded_ends_the_process_with_its_error(tmp_path):
    with starting(str(tmp_path / "nothing"), "--port", "0") as process:
        assert process.wait(60) == 2
        assert "model_not_found" in process.stderr.read()


async def test_more_than_the_queue_holds_is_refused_and_the_rest_is_served():
    flags = ("--served-model-name", "demo", "--max-num-seqs", "2", "--max-waiting", "3")
    with running_server("demo", *flags) as server:
        async with clients(server.url) as client, httpx2.AsyncClient(base_url=server.url) as http:
            begun: asyncio.Queue = asyncio.Queue()
            asked = [asyncio.create_task(stream(client, begun, tokens=300)) for _ in range(40)]
            ends = await asyncio.gather(*asked)
            assert set(ends) == {"length", "queue_full"}
            assert ends.count("length") >= 3
            busy = [asyncio.create_task(stream(client, begun)) for _ in range(2)]
            while (await http.get("/health")).json()["running"] < 2:
                pass
            busy += [asyncio.create_task(stream(client, begun)) for _ in range(3)]
            while (ready := await http.get("/readyz")).json()["status"] == "ok":
                pass
            assert (ready.status_code, ready.json()["status"]) == (200, "saturated")
            refused = await http.post("/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            late = await http.post("/v1/completions", json={"prompt": "a", "timeout_s": 0.01})
            assert late.status_code in (408, 429)
            assert await asyncio.gather(*busy) == ["length"] * 5
            late = await http.post(
                "/v1/completions", json={"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "timeout_s": 0.05}
            )
            assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
        assert server.stop() == 0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and certificates of it for a server and a client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / f"{name}.ext").write_text("subjectAltName=IP:127.0.0.1")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", f"{name}.pem", "-days", "2", "-extfile", f"{name}.ext",
        )  # fmt: skip
    return folder


async def test_tls_with_the_official_client_and_certificates_of_clients(certificates):
    files = {name: str(certificates / name) for name in ("ca.pem", "server.pem", "server.key")}
    flags = ("--tls-cert", files["server.pem"], "--tls-key", files["server.key"], "--tls-client-ca", files["ca.pem"])
    with running_server("demo", "--served-model-name", "demo", *flags) as server:
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=files["ca.pem"])
        with pytest.raises(openai.APIConnectionError):
            async with clients(server.url, http_client=openai.DefaultAsyncHttpxClient(verify=trusting)) as client:
                await client.models.list()
        trusting.load_cert_chain(certificates / "client.pem", certificates / "client.key")
        async with clients(server.url, http_client=openai.DefaultAsyncHttpxClient(verify=trusting)) as client:
            assert await stream(client, asyncio.Queue(), tokens=5) == "length"
        assert server.stop() == 0
