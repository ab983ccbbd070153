"""Who gets in: every route with and without keys, scopes, ports, and the forms that errors take."""

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import unquote

import anthropic
import httpx2
import openai
import pytest
from fastapi import FastAPI

from tokenmill.server.app import create_app
from tokenmill.server.config import AccessConfig, ServerConfig, StoreConfig
from tokenmill.server.middleware.access import scope_of
from tokenmill.server.observability.metrics import Metrics
from tokenmill.server.principal import SCOPES
from tokenmill.server.tenancy.keys import Key, Keyring, Keys, KeySpec
from tokenmill.server.tenancy.store import Store
from tokenmill.server.tenancy.tenants import Tenants

OPEN = {"/health", "/livez", "/readyz", "/startupz"}


@pytest.fixture
def keyring(tmp_path: Any) -> Keyring:
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    return Keyring(Keys(store))


@pytest.fixture
def make(keyring: Keyring) -> Callable[..., tuple[Key, str]]:
    def make(*scopes: str, **fields: Any) -> tuple[Key, str]:
        made = keyring.keys.create(KeySpec(name="test", scopes=frozenset(scopes or {"inference"}), **fields))
        keyring.refresh()
        return made

    return make


@pytest.fixture
def app(llm: Any, keyring: Keyring) -> FastAPI:
    return create_app(llm, ServerConfig(max_body_mib=0.01), Metrics("scripted"), Tenants(keyring=keyring))


@contextlib.asynccontextmanager
async def client_of(app: FastAPI, port: int = 80) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url=f"http://server:{port}") as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Every method of every path, with something in place of each parameter."""
    return [
        (method.upper(), path.replace("{", "").replace("}", ""))
        for path, operations in app.openapi()["paths"].items()
        for method in operations
    ]


async def test_no_route_answers_without_a_key(app: FastAPI) -> None:
    listed = routes(app)
    assert len(listed) >= 10
    assert {path for _, path in listed} >= {"/v1/chat/completions", "/v1/models", "/metrics", "/admin/keys"}
    async with client_of(app) as http:
        more = [
            ("GET", "/openapi.json"),
            ("GET", "/"),
            ("GET", "/no/such"),
            ("GET", "/admin"),
            ("OPTIONS", "/v1/models"),
        ]
        for method, path in listed + more:
            for headers in (
                {},
                bearer("none"),
                {"x-api-key": "tm-000000000000-" + "A" * 43},
                {"authorization": "Basic x"},
            ):
                answer = await http.request(method, path, headers=headers)
                if path in OPEN:
                    assert answer.status_code == 200, path
                    continue
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.headers["x-request-id"]
                assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_every_route_wants_its_scope_and_no_other(app: FastAPI, make: Any) -> None:
    secrets = {scope: make(scope)[1] for scope in SCOPES}
    async with client_of(app) as http:
        for (method, path), (scope, secret) in itertools.product(routes(app), secrets.items()):
            answer = await http.request(method, path, headers=bearer(secret))
            if path in OPEN:
                continue
            if scope == scope_of(path):
                assert answer.status_code not in (401, 403), (method, path)
            else:
                assert answer.status_code == 403, (method, path)
                assert answer.json()["error"]["code"] == "insufficient_scope"


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/livez", None), ("/livez/", "inference"), ("/livez/../admin/keys", "inference"), ("/health/x", "inference"),
        ("/admin", "admin"), ("/admin/keys", "admin"), ("/admin/anything/new", "admin"),
        ("/administrator", "inference"),
        ("/metrics", "metrics"), ("/metrics/", "inference"), ("/v1/models", "inference"), ("", "inference"),
        ("//admin/keys", "inference"), ("/ADMIN/keys", "inference"),
    ],
)  # fmt: skip
def test_the_scope_of_a_path(path: str, scope: str | None) -> None:
    assert scope_of(path) == scope


@pytest.mark.parametrize("path", ["//admin/keys", "/ADMIN/keys", "/v1/../admin/keys", "/v1/%2e%2e/admin/keys",
                                  "/v1/models/../../admin/keys", "/admin%2fkeys", "/livez/../admin/keys"])  # fmt: skip
async def test_no_way_of_writing_a_path_reaches_the_keys_with_another_scope(app: FastAPI, make: Any, path: str) -> None:
    secret = make("inference")[1]
    states = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        states.append(message.get("status"))

    await app(
        {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "query_string": b"",
         "headers": [(b"authorization", f"Bearer {secret}".encode())], "server": ("server", 80), "scheme": "http",
         "root_path": "", "http_version": "1.1", "client": ("c", 1)}, receive, send,
    )  # fmt: skip
    assert states[0] in (403, 404)


async def test_both_headers_are_taken(app: FastAPI, make: Any) -> None:
    _, secret = make()
    async with client_of(app) as http:
        for headers in (bearer(secret), {"authorization": f"bearer  {secret} "}, {"x-api-key": secret}):
            assert (await http.get("/v1/models", headers=headers)).status_code == 200
        wrong = {"authorization": "Bearer wrong", "x-api-key": secret}  # the first is meant
        assert (await http.get("/v1/models", headers=wrong)).status_code == 401


async def test_the_official_clients_understand_the_refusal(url: str, make: Any) -> None:
    _, secret = make("metrics")
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as unknown:
            await client.models.list()
        assert unknown.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError) as denied:
            await client.with_options(api_key=secret).models.list()
        assert denied.value.code == "insufficient_scope"
    async with anthropic.AsyncAnthropic(base_url=url, api_key="wrong", max_retries=0) as theirs:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            await theirs.messages.create(model="scripted", max_tokens=5, messages=[{"role": "user", "content": "Hi"}])
        body = caught.value.body
        assert isinstance(body, dict)
        assert body["error"]["type"] == "authentication_error"


async def test_a_body_is_not_read_before_the_key_is_known(app: FastAPI) -> None:
    async with client_of(app) as http:
        answer = await http.post("/v1/completions", content=b"x" * 100_000)
        assert answer.status_code == 401


async def test_what_a_key_is_for_reaches_the_engine(app: FastAPI, make: Any, llm: Any) -> None:
    key, secret = make(priority=5)
    async with client_of(app) as http:
        body = {"prompt": "a", "priority": 2, "cache_salt": "own", "user": "somebody"}
        assert (await http.post("/v1/completions", headers=bearer(secret), json=body)).status_code == 200
    [call] = llm.calls
    assert (call.priority, call.tenant, call.cache_salt) == (7, key.id, key.salt + "own")
    assert len(key.salt) == 32


async def test_a_key_for_one_model_may_not_use_another(llm: Any, keyring: Keyring, make: Any) -> None:
    config = ServerConfig(served_model_name=("small", "large"))
    app = create_app(llm, config, Metrics("scripted"), Tenants(keyring=keyring))
    _, secret = make(models=frozenset({"small"}))
    async with client_of(app) as http:
        for model, status in (("small", 200), ("large", 403), ("../small", 404)):
            answer = await http.post("/v1/completions", headers=bearer(secret), json={"prompt": "a", "model": model})
            assert answer.status_code == status
            if status == 403:
                assert answer.json()["error"]["code"] == "model_not_allowed"
        listed = (await http.get("/v1/models", headers=bearer(secret))).json()["data"]
        assert [model["id"] for model in listed] == ["small"]
    assert len(llm.calls) == 1


async def test_a_port_for_administrators_has_their_endpoints_and_the_public_one_has_not(
    llm: Any, keyring: Keyring, make: Any
) -> None:
    config = ServerConfig(access=AccessConfig(admin_port=9001))
    app = create_app(llm, config, Metrics("scripted"), Tenants(keyring=keyring))
    headers = bearer(make(*SCOPES)[1])
    for port, status in ((9001, {"admin": 200, "metrics": 200, "inference": 404}),
                         (8000, {"admin": 404, "metrics": 404, "inference": 200})):  # fmt: skip
        async with client_of(app, port) as http:
            for path in ("/admin/keys", "/metrics", "/v1/models"):
                scope = scope_of(path)
                assert scope is not None
                assert (await http.get(path, headers=headers)).status_code == status[scope], (port, path)
            # What a client says about the host does not matter.
            forged = {**headers, "host": "server:9001", "x-forwarded-port": "9001"}
            assert (await http.get("/admin/keys", headers=forged)).status_code == status["admin"]
            assert (await http.get("/health")).status_code == 200


async def test_without_keys_everybody_may_everything_but_make_keys(llm: Any) -> None:
    app = create_app(llm, ServerConfig(), Metrics("scripted"))
    async with client_of(app) as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/metrics", headers=bearer("whatever"))).status_code == 200
        for path in ("/admin/keys", "/admin/usage"):
            assert (await http.get(path)).status_code == 400


async def test_keys_are_made_rotated_and_revoked_over_http_and_take_effect_at_once(app: FastAPI, make: Any) -> None:
    admin = bearer(make("admin")[1])
    async with client_of(app) as http:
        body = {"name": "agents", "limits": {"requests_per_minute": 9}, "owner": "Ada", "expires_in_s": 3600}
        made = await http.post("/admin/keys", headers=admin, json=body)
        assert made.status_code == 200
        assert made.headers["cache-control"] == "no-store"
        first, key_id = made.json()["key"], made.json()["id"]
        assert made.json()["limits"]["requests_per_minute"] == 9
        assert (await http.get("/v1/models", headers=bearer(first))).status_code == 200

        rotated = await http.post(f"/admin/keys/{key_id}/rotate", headers=admin, json={"grace_s": 0})
        second = rotated.json()["key"]
        assert (await http.get("/v1/models", headers=bearer(first))).status_code == 401
        assert (await http.get("/v1/models", headers=bearer(second))).status_code == 200
        third = (await http.post(f"/admin/keys/{key_id}/rotate", headers=admin)).json()["key"]
        for secret in (second, third):
            assert (await http.get("/v1/models", headers=bearer(secret))).status_code == 200

        listed = (await http.get("/admin/keys", headers=admin)).json()["data"]
        assert [key["name"] for key in listed] == ["test", "agents"]
        assert first not in str(listed)
        assert not any("key" in key or "hash" in key or "salt" in key for key in listed)

        assert (await http.delete(f"/admin/keys/{key_id}", headers=admin)).json()["status"] == "revoked"
        for secret in (second, third):
            assert (await http.get("/v1/models", headers=bearer(secret))).status_code == 401


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "name"), ({"name": ""}, "name"), ({"name": "a\n"}, "name"), ({"name": "x", "scopes": ["root"]}, "scopes"),
        ({"name": "x", "scopes": []}, "scopes"), ({"name": "x", "limits": {"concurrency": 0}}, "concurrency"),
        ({"name": "x", "limits": {"x": 1}}, "limits.x"), ({"name": "x", "expires_in_s": -1}, "expires_in_s"),
        ({"name": "x", "priority": 2**40}, "priority"), ({"name": "x", "role": "admin"}, "role"),
    ],
)  # fmt: skip
async def test_a_key_that_cannot_be_is_refused_by_field(app: FastAPI, make: Any, body: Any, field: str) -> None:
    async with client_of(app) as http:
        answer = await http.post("/admin/keys", headers=bearer(make("admin")[1]), json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("key_id", ["000000000000", "..%2f..%2fetc", "%00", "%F0%9F%98%80", "' OR '1'='1", "x" * 1000])
async def test_an_id_that_is_none_is_not_found(app: FastAPI, make: Any, key_id: str) -> None:
    admin = bearer(make("admin")[1])
    async with client_of(app) as http:
        for method, path in (("DELETE", f"/admin/keys/{key_id}"), ("POST", f"/admin/keys/{key_id}/rotate")):
            assert (await http.request(method, path, headers=admin)).status_code == 404
