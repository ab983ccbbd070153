"""/v1/files through the official client."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI

from tokenmill.server.app import create_app
from tokenmill.server.config import KeepConfig, ServerConfig
from tokenmill.server.observability.metrics import Metrics


async def test_a_file_is_kept_listed_read_and_deleted(client: openai.AsyncOpenAI) -> None:
    data = b'{"custom_id": "1"}\n'
    made = await client.files.create(file=("lines.jsonl", data), purpose="batch")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(data), "lines.jsonl", "batch")
    assert made.expires_at is not None
    assert made.expires_at == made.created_at + 30 * 86400
    assert await client.files.retrieve(made.id) == made
    assert (await client.files.content(made.id)).content == data
    assert [file.id async for file in client.files.list()] == [made.id]
    deleted = await client.files.delete(made.id)
    assert (deleted.id, deleted.deleted) == (made.id, True)
    for asked in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            await asked(made.id)
        assert (caught.value.code, caught.value.param) == ("not_found", "file_id")


async def test_lists_are_paged_ordered_and_narrowed(client: openai.AsyncOpenAI) -> None:
    ids = [(await client.files.create(file=(f"{i}", b"x"), purpose="user_data")).id for i in range(5)]
    other = await client.files.create(file=("o", b"x"), purpose="evals")
    assert [file.id async for file in client.files.list(limit=2, purpose="user_data")] == ids[::-1]
    assert [file.id async for file in client.files.list(limit=2, purpose="user_data", order="asc")] == ids
    assert [file.id async for file in client.files.list(purpose="evals")] == [other.id]
    page = await client.files.list(limit=2, after=ids[3])
    assert [file.id for file in page.data] == [ids[2], ids[1]]
    assert page.has_more
    with pytest.raises(openai.NotFoundError) as caught:
        await client.files.list(after="file-none")
    assert caught.value.param == "after"


async def test_a_file_expires_when_its_owner_says(client: openai.AsyncOpenAI, app: FastAPI, monkeypatch: Any) -> None:
    made = await client.files.create(
        file=("a", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600
    path: Path = app.state.backlog.files.path(made.id)
    assert path.exists()
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(made.id)
    await app.state.backlog.start()  # sweeps
    while path.exists():
        await client.files.list()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\evil.exe", "evil.exe"),
        ("..", "file"),
        ('a";b\r\nset-cookie: x', 'a";bset-cookie: x'),
        ("naïve ☃.jsonl", "naïve ☃.jsonl"),
        ("x" * 1000, "x" * 255),
    ],
)
async def test_a_clients_name_for_a_file_is_only_shown(
    http: httpx2.AsyncClient, app: FastAPI, config: ServerConfig, name: str, shown: str
) -> None:
    made = app.state.backlog.files.save(_Bytes(b"x"), name, "user_data", "", None)
    assert made["filename"] == shown
    kept = [path.name for path in (Path(config.store.state) / "files").iterdir()]
    assert kept == [made["id"]]
    answer = await http.get(f"/v1/files/{made['id']}/content")
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith("attachment; filename")
    assert disposition.count('"') in (0, 2)
    assert "set-cookie" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"] == "application/octet-stream"


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, _: int) -> bytes:
        data, self._data = self._data, b""
        return data


@pytest.mark.parametrize(
    "file_id", ["..%2Fobjects.db", "%2e%2e%2fobjects.db", "..", "%2Fetc%2Fpasswd", "file-%00", "file-..%5Cx"]
)
async def test_an_id_is_never_a_path(http: httpx2.AsyncClient, file_id: str) -> None:
    await http.get("/v1/files")  # the folder is there now
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        for method in ("GET", "DELETE"):
            answer = await http.request(method, path)
            assert answer.status_code in (404, 405)
            assert "SQLite" not in answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"data": {"purpose": "batch"}}, "file"),
        ({"data": {"purpose": "batch", "file": "text"}}, "file"),
        ({"files": {"file": b"x"}}, "purpose"),
        ({"files": {"file": b"x"}, "data": {"purpose": "hats"}}, "purpose"),
        (
            {"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after[anchor]": "created_at"}},
            "expires_after.seconds",
        ),
        (
            {
                "files": {"file": b"x"},
                "data": {
                    "purpose": "batch",
                    "expires_after[anchor]": "created_at",
                    "expires_after[seconds]": "5",
                },
            },
            "expires_after.seconds",
        ),
        ({"json": {}}, "file"),
    ],
)
async def test_a_wrong_upload_is_refused_with_its_field(
    http: httpx2.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    answer = await http.post("/v1/files", **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(("query", "param"), [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order")])
async def test_a_wrong_parameter_of_a_list_is_refused(http: httpx2.AsyncClient, query: str, param: str) -> None:
    answer = await http.get(f"/v1/files?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_broken_multipart_is_refused(http: httpx2.AsyncClient) -> None:
    answer = await http.post(
        "/v1/files", content=b"no boundary here", headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 400


async def test_uploads_have_a_limit_of_their_own(http: httpx2.AsyncClient, config: ServerConfig) -> None:
    beyond_other_bodies = b"x" * int(config.max_body_mib * 2**20 * 4)
    answer = await http.post("/v1/files", files={"file": beyond_other_bodies}, data={"purpose": "user_data"})
    assert (answer.status_code, answer.json()["bytes"]) == (200, len(beyond_other_bodies))


async def test_an_upload_beyond_the_limit_leaves_nothing(llm: Any, config: ServerConfig) -> None:
    small = dataclasses.replace(config, keep=KeepConfig(max_file_mib=0.25))
    app = create_app(llm, small, Metrics("x"))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://server") as http:
        answer = await http.post("/v1/files", files={"file": b"x" * 2**19}, data={"purpose": "user_data"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert (await http.get("/v1/files")).json()["data"] == []
    assert not (Path(config.store.state) / "files").exists()
    await app.state.backlog.close()


async def test_a_state_folder_that_cannot_be_used_is_said(http: httpx2.AsyncClient, config: ServerConfig) -> None:
    Path(config.store.state).write_text("a file is in the way")
    for answer in (
        await http.get("/v1/files"),
        await http.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch"}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "state_unavailable")
