"""/admin/keys: the keys, for programs; `tokenmill keys` is the same for people."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.errors import RequestError
from tokenmill.server.openapi import documented
from tokenmill.server.schemas.request import Int, Strict, parse
from tokenmill.server.tenancy.keys import Keyring, KeySpec, limits_of
from tokenmill.types import JSON

ROUTER = APIRouter()

T = TypeVar("T")

Span = Annotated[float, Field(ge=0, le=3.2e9)]
"""Seconds, up to a hundred years."""


class KeyLimits(Strict):
    """`tokenmill.server.principal.Limits`."""

    requests_per_minute: Int | None = None
    tokens_per_minute: Int | None = None
    concurrency: Int | None = None
    tokens_per_day: Int | None = None
    dollars_per_day: float | None = None


class CreateKey(Strict):
    """A key to make."""

    name: str
    scopes: list[str] = Field(["inference"])
    models: list[str] | None = None
    priority: Int = 0
    limits: KeyLimits = KeyLimits()
    owner: str = ""
    note: str = ""
    expires_in_s: Span | None = None


class RotateKey(Strict):
    """A key to rotate."""

    grace_s: Span = 86_400.0
    """How long the old secret stays good."""


@ROUTER.get("/admin/keys", **documented(None, 400, 503))
async def list_keys(request: Request) -> Response:
    """All keys, also those that are no longer good; never their secrets."""
    keys = _keyring(request).keys
    found = await asyncio.to_thread(keys.all)
    return _answer({"object": "list", "data": [key.to_json(keys.now()) for key in found]})


@ROUTER.post("/admin/keys", **documented(CreateKey))
async def create_key(request: Request) -> Response:
    """Makes a key. The answer holds its secret, which cannot be read again."""
    keyring = _keyring(request)
    body = parse(CreateKey, await request.body())
    now = keyring.keys.now()
    spec = KeySpec(
        name=body.name,
        scopes=frozenset(body.scopes),
        models=None if body.models is None else frozenset(body.models),
        priority=body.priority,
        limits=limits_of(body.limits.model_dump()),
        owner=body.owner,
        note=body.note,
        expires=None if body.expires_in_s is None else now + body.expires_in_s,
    )
    key, secret = await _change(keyring, lambda: keyring.keys.create(spec))
    return _answer(key.to_json(now) | {"key": secret})


@ROUTER.post("/admin/keys/{key_id}/rotate", **documented(RotateKey))
async def rotate_key(request: Request, key_id: str) -> Response:
    """Gives a key a new secret, which is in the answer; the old one stays good for `grace_s`."""
    keyring = _keyring(request)
    body = parse(RotateKey, await request.body() or b"{}")
    key, secret = await _change(keyring, lambda: keyring.keys.rotate(key_id, body.grace_s))
    return _answer(key.to_json(keyring.keys.now()) | {"key": secret})


@ROUTER.delete("/admin/keys/{key_id}", **documented(None, 400, 404, 503))
async def revoke_key(request: Request, key_id: str) -> Response:
    """Ends a key: here at once, on other servers within two seconds."""
    keyring = _keyring(request)
    key = await _change(keyring, lambda: keyring.keys.revoke(key_id))
    return _answer(key.to_json(keyring.keys.now()))


def _keyring(request: Request) -> Keyring:
    keyring = request.app.state.tenants.keyring
    if keyring is None:
        # Anybody could make keys for the day on which they are switched on.
        raise RequestError("keys_off", "This server asks for no keys. Start it with --auth.")
    assert isinstance(keyring, Keyring)
    return keyring


async def _change(keyring: Keyring, action: Callable[[], T]) -> T:
    """Does `action` on a thread, since it waits for the database, and lets this server see its effect."""

    def changed() -> T:
        result = action()
        keyring.refresh()
        return result

    return await asyncio.to_thread(changed)


def _answer(content: JSON) -> Response:
    return Response(msgspec.json.encode(content), headers={"cache-control": "no-store"}, media_type="application/json")
