"""An external endpoint decides, over real HTTP; when it fails, the option decides."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tokenmill.errors import RequestError, UnavailableError
from tokenmill.server.config import FilterConfig
from tokenmill.server.filter import Blocked, TextFilter
from tokenmill.server.filters.moderation import FILTER


class Endpoint(ThreadingHTTPServer):
    """Flags texts that hold "bad". Other answers can be set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.texts: list[str] = []
        self.keys: list[str | None] = []
        self.answer: tuple[int, bytes] | None = None
        self.url = f"http://127.0.0.1:{self.server_port}/v1/moderations"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        self.server.texts.append(text)
        self.server.keys.append(self.headers["authorization"])
        flagged = json.dumps({"results": [{"flagged": "bad" in text}]}).encode()
        status, body = self.server.answer or (200, flagged)
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


async def test_flagged_prompts_are_refused(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3\n")
    chain = FILTER(FilterConfig(moderation_url=endpoint.url, moderation_key_file=str(tmp_path / "key")))
    assert await chain.text("good") == "good"
    with pytest.raises(RequestError) as caught:
        await chain.text("a bad thing")
    assert caught.value.code == "content_refused"
    assert "bad" not in caught.value.message
    assert endpoint.keys == ["Bearer s3"] * 2


async def read(stream: TextFilter, pieces: list[str]) -> tuple[str, bool]:
    out = ""
    try:
        for piece in pieces:
            out += await stream.push(piece)
        return out + await stream.finish(), False
    except Blocked as end:
        return out + end.text, True


@pytest.mark.parametrize("size", [1, 7, 400, 5000])
async def test_answers_pass_in_sections_however_they_are_split(endpoint: Endpoint, size: int) -> None:
    chain = FILTER(FilterConfig(moderation_url=endpoint.url))
    text = "x" * 900 + "bad" + "y" * 300
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert await read(chain.stream(), pieces) == ("x" * 800, True)
    assert [len(each) for each in endpoint.texts] == [400, 800, 1200]
    assert await read(chain.stream(), ["good"]) == ("good", False)


@pytest.mark.parametrize("answer", [(500, b""), (200, b"no json"), (200, b"{}"), (401, b"{}")])
async def test_when_it_fails_the_option_decides(endpoint: Endpoint, answer: tuple[int, bytes]) -> None:
    endpoint.answer = answer
    closed = FILTER(FilterConfig(moderation_url=endpoint.url))
    with pytest.raises(UnavailableError) as caught:
        await closed.text("good")
    assert caught.value.code == "moderation_unavailable"
    assert await read(closed.stream(), ["good"]) == ("", True)
    opened = FILTER(FilterConfig(moderation_url=endpoint.url, moderation_open=True))
    assert await opened.text("good") == "good"
    assert await read(opened.stream(), ["good"]) == ("good", False)


async def test_an_endpoint_that_is_away_is_a_failure() -> None:
    url = "http://127.0.0.1:9/v1/moderations"
    with pytest.raises(UnavailableError):
        await FILTER(FilterConfig(moderation_url=url)).text("good")
