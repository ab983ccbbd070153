"""Models and health, and how the app finds its routes."""

from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI

from tokenmill.llm import Health
from tokenmill.server.app import ROUTES, create_app
from tokenmill.server.config import ServerConfig
from tokenmill.server.observability.metrics import Metrics


async def test_models(client: openai.AsyncOpenAI) -> None:
    listed = [model async for model in client.models.list()]
    assert [(model.id, model.object, model.owned_by) for model in listed] == [("scripted", "model", "tokenmill")]
    assert listed[0].model_extra is not None
    assert listed[0].model_extra["max_model_len"] == 2048
    assert await client.models.retrieve("scripted") == listed[0]
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


async def test_a_model_has_several_names_and_they_may_hold_slashes(llm: Any) -> None:
    app = create_app(llm, ServerConfig(served_model_name=("org/name", "short")), Metrics("x"))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://server") as http:
        assert (await http.get("/v1/models/org/name")).json()["id"] == "org/name"
        answer = await http.post("/v1/completions", json={"prompt": "a", "model": "org/name"})
        assert answer.json()["model"] == "org/name"
        answer = await http.post("/v1/completions", json={"prompt": "a", "model": "short"})
        assert answer.json()["model"] == "short"
        assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["org/name", "short"]
        answer = await http.post("/v1/completions", json={"prompt": "a", "model": "scripted"})
        assert answer.status_code == 404


async def test_health(http: httpx2.AsyncClient, app: FastAPI, llm: Any) -> None:
    answer = await http.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "reason": "", "last_progress_age_s": 0.5, "running": 1, "waiting": 2}

    llm.state = Health(False, "No step has ended for 130 s.", 130.0, 1, 0)
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")
    assert answer.json()["reason"] == "No step has ended for 130 s."

    llm.state = Health(True, "", 0.0, 0, 0)
    app.state.lifecycle.drain()
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "shutting_down")


@pytest.mark.parametrize(
    ("state", "startup", "live", "ready"),
    [
        (Health(True, "", 0.0, 1, 0), 200, 200, (200, "ok")),
        (Health(False, "", 0.0, 0, 0, phase="weights", percent=41.26), 503, 200, (503, "starting")),
        (Health(False, "It died.", 0.0, 0, 0, phase="restarting"), 200, 200, (503, "restarting")),
        (Health(False, "No step.", 99.0, 1, 0, hung=True), 200, 503, (503, "hung")),
        (Health(True, "", 0.0, 8, 9, full=True), 200, 200, (200, "saturated")),
    ],
    ids=["ready", "loading", "restarting", "hung", "saturated"],
)
async def test_probes(http: httpx2.AsyncClient, llm: Any, state: Health, startup: int, live: int, ready: Any) -> None:
    llm.state = state
    answers = {path: await http.get(path) for path in ("/startupz", "/livez", "/readyz")}
    assert [answer.status_code for answer in answers.values()] == [startup, live, ready[0]]
    assert answers["/readyz"].json()["status"] == ready[1]
    assert answers["/startupz"].json()["percent"] == round(state.percent, 1)


async def test_requests_for_a_model_that_still_loads_are_told_to_come_back(http: httpx2.AsyncClient, llm: Any) -> None:
    llm.state = Health(False, "", 0.0, 0, 0, phase="weights", percent=12.0)
    for path in ("/v1/chat/completions", "/v1/completions"):
        answer = await http.post(path, json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "starting")
        assert int(answer.headers["retry-after"]) >= 1
    assert (await http.get("/metrics")).status_code == 200


async def test_a_drain_is_seen_before_anything_is_refused(http: httpx2.AsyncClient, app: FastAPI, llm: Any) -> None:
    assert "tokenmill:draining{" in (await http.get("/metrics")).text
    answer = await http.post("/admin/drain", params={"delay_s": 3600})
    assert answer.status_code == 202
    assert (await http.get("/readyz")).json()["status"] == "draining"
    assert not llm.refusing
    assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    assert not app.state.lifecycle.stopping.is_set()
    await http.post("/admin/drain")
    assert llm.refusing
    assert app.state.lifecycle.stopping.is_set()
    assert 'tokenmill:draining{engine="0",model_name="scripted"} 1.0' in (await http.get("/metrics")).text


async def test_a_delay_that_is_no_number_is_refused(http: httpx2.AsyncClient, llm: Any) -> None:
    answer = await http.post("/admin/drain", params={"delay_s": "soon"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "delay_s")
    assert not llm.refusing


def test_routes_are_the_files_of_their_folder() -> None:
    assert set(ROUTES.names()) >= {"chat", "completions", "health", "metrics", "models"}
    assert all(ROUTES.get(name).routes for name in ROUTES.names())
