"""Models and health, and how the app finds its routes."""

from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI

from tokenmill.llm import Health
from tokenmill.server.app import ROUTES, create_app
from tokenmill.server.config import ServerConfig
from tokenmill.server.metrics import Metrics


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
    app.state.stopping = True
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "shutting_down")


def test_routes_are_the_files_of_their_folder() -> None:
    assert set(ROUTES.names()) >= {"chat", "completions", "health", "metrics", "models"}
    assert all(ROUTES.get(name).routes for name in ROUTES.names())
