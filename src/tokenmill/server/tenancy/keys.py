"""API keys: made, rotated and revoked in the database; recognized from memory.

A key reads ``tm-<id>-<secret>``: a public id, and 256 random bits. The database holds its SHA-256. A slow hash such as
argon2 protects passwords because they can be guessed; 256 random bits cannot be, and a slow hash on each request would
only be a way to keep the server busy.

The server reads the table once, and then, every two seconds, what has changed. So no request waits for the database,
known keys stay good while it is away, and a revoked key is refused everywhere after at most two seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy
from sqlalchemy.exc import IntegrityError

from tokenmill.errors import RequestError, UnavailableError, did_you_mean
from tokenmill.server.principal import NO_LIMITS, SCOPES, Limits, Principal
from tokenmill.server.tenancy.store import DATABASE_ERRORS, KEYS, Store
from tokenmill.types import JSON

__all__ = ["REFRESH_S", "Key", "KeySpec", "Keyring", "Keys", "limits_of"]

REFRESH_S = 2.0
"""How long a change of a key may take to reach every server."""

_logger = logging.getLogger(__name__)
_ID = "[0-9a-f]{12}"
_FORM = re.compile(rf"tm-({_ID})-[A-Za-z0-9_-]{{43}}")
_ATTEMPTS = 20
_LONGEST = 200
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).hexdigest()
"""What a key with an unknown id is compared with: no key has this hash, and the comparison takes as long as any."""


@dataclasses.dataclass(frozen=True)
class KeySpec:
    """What one decides about a key.

    Raises:
        RequestError: ``invalid_parameter``, naming the field.
    """

    name: str
    scopes: frozenset[str] = frozenset({"inference"})
    models: frozenset[str] | None = None
    """Served names that it may use; None is every model."""
    priority: int = 0
    """Added to the priority that a request asks for."""
    limits: Limits = NO_LIMITS
    owner: str = ""
    note: str = ""
    expires: float | None = None
    """Seconds since 1970; None is never."""

    def __post_init__(self) -> None:
        for field in ("name", "owner", "note"):
            text = getattr(self, field)
            if len(text) > _LONGEST or not text.isprintable():
                raise _invalid(field, f"at most {_LONGEST} printable characters")
        if not self.name.strip():
            raise _invalid("name", "a text that tells people whose key it is")
        if not self.scopes:
            raise _invalid("scopes", "at least one of " + ", ".join(sorted(SCOPES)))
        if unknown := self.scopes - SCOPES:
            word = min(unknown)
            raise RequestError(
                "invalid_parameter", f"There is no scope {word!r}. {did_you_mean(word, SCOPES)}", "scopes"
            )
        if self.models is not None and not self.models:
            raise _invalid("models", "left out for every model, or name at least one")
        if not -(2**31) <= self.priority < 2**31:
            raise _invalid("priority", "a number of 32 bits")


@dataclasses.dataclass(frozen=True)
class Key:
    """A key as the database knows it; what it takes to use it is not in here."""

    id: str
    spec: KeySpec
    created: float
    revoked: float | None
    hash: str = dataclasses.field(repr=False)
    old_hash: str | None = dataclasses.field(repr=False)
    old_until: float | None
    salt: str = dataclasses.field(repr=False)
    version: int

    def status(self, now: float) -> str:
        """``active``, ``expired`` or ``revoked``."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.spec.expires is not None and self.spec.expires <= now else "active"

    def to_json(self, now: float) -> JSON:
        """What an administrator may see."""
        spec = self.spec
        return {
            "id": self.id,
            "name": spec.name,
            "owner": spec.owner,
            "note": spec.note,
            "status": self.status(now),
            "scopes": sorted(spec.scopes),
            "models": None if spec.models is None else sorted(spec.models),
            "priority": spec.priority,
            "limits": dataclasses.asdict(spec.limits),
            "created": self.created,
            "expires": spec.expires,
            "revoked": self.revoked,
            "old_until": self.old_until,
        }


class Keys:
    """The keys in the database.

    Args:
        now: seconds since 1970.
    """

    def __init__(self, store: Store, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self.now = now

    def create(self, spec: KeySpec) -> tuple[Key, str]:
        """Makes a key. What is returned beside it is the key itself, which nobody can ever read again.

        Raises:
            UnavailableError: ``database_unavailable``.
        """
        key_id = secrets.token_hex(6)
        secret = _secret(key_id)
        row = {
            "id": key_id,
            "name": spec.name,
            "owner": spec.owner,
            "note": spec.note,
            "hash": _hash(secret),
            "scopes": json.dumps(sorted(spec.scopes)),
            "models": None if spec.models is None else json.dumps(sorted(spec.models)),
            "priority": spec.priority,
            "limits": json.dumps({k: v for k, v in dataclasses.asdict(spec.limits).items() if v is not None}),
            "salt": secrets.token_hex(16),
            "created": self.now(),
            "expires": spec.expires,
        }
        self._write(lambda version: sqlalchemy.insert(KEYS).values(**row, version=version))
        return self.get(key_id), secret

    def get(self, key_id: str) -> Key:
        """One key.

        Raises:
            RequestError: ``key_not_found``.
            UnavailableError: ``database_unavailable``.
        """
        found = self._read(KEYS.c.id == key_id) if re.fullmatch(_ID, key_id) else []
        if not found:
            raise RequestError("key_not_found", f"There is no key with the id {key_id[:_LONGEST]!r}.", "id")
        return found[0]

    def all(self) -> list[Key]:
        """All keys, the oldest first, those that are no longer good too.

        Raises:
            UnavailableError: ``database_unavailable``.
        """
        return sorted(self.changed_after(0), key=lambda key: (key.created, key.id))

    def changed_after(self, version: int) -> list[Key]:
        """The keys that were made or changed after the change of that number, in the order of their changes.

        Raises:
            UnavailableError: ``database_unavailable``.
        """
        return self._read(KEYS.c.version > version)

    def rotate(self, key_id: str, grace_s: float) -> tuple[Key, str]:
        """Gives a key a new secret; the one before stays good for `grace_s` seconds, those before it end now.

        Raises:
            RequestError: ``key_not_found``, or ``key_not_active`` for one that has expired or was revoked.
            UnavailableError: ``database_unavailable``.
        """
        key = self.get(key_id)
        if (status := key.status(self.now())) != "active":
            raise RequestError("key_not_active", f"The key {key_id} is {status}. Make a new one.", "id")
        secret = _secret(key_id)
        changed = {"hash": _hash(secret), "old_hash": key.hash, "old_until": self.now() + grace_s}
        # Whoever changed the key meanwhile wins: a secret that somebody else was just given must not be overwritten.
        same = (KEYS.c.id == key_id) & (KEYS.c.version == key.version)
        if not self._write(lambda version: sqlalchemy.update(KEYS).where(same).values(**changed, version=version)):
            raise RequestError("key_changed", f"The key {key_id} was changed by somebody else just now.", "id")
        return self.get(key_id), secret

    def revoke(self, key_id: str) -> Key:
        """Ends a key for good. Doing so twice is no error.

        Raises:
            RequestError: ``key_not_found``.
            UnavailableError: ``database_unavailable``.
        """
        good = (KEYS.c.id == self.get(key_id).id) & KEYS.c.revoked.is_(None)
        self._write(lambda version: sqlalchemy.update(KEYS).where(good).values(revoked=self.now(), version=version))
        return self.get(key_id)

    def _read(self, condition: sqlalchemy.ColumnElement[bool]) -> list[Key]:
        try:
            with self._store.reading() as connection:
                rows = connection.execute(sqlalchemy.select(KEYS).where(condition).order_by(KEYS.c.version))
                return [_from_row(row) for row in rows.mappings()]
        except DATABASE_ERRORS as error:
            raise _unavailable() from error

    def _write(self, statement: Callable[[Any], sqlalchemy.Executable]) -> int:
        """Does `statement`, which is given the number of the change; returns how many rows it touched.

        Two writers can take the same number. The database lets one of them through, and the other tries again, so
        that numbers become visible in their order.
        """
        number = sqlalchemy.select(sqlalchemy.func.coalesce(sqlalchemy.func.max(KEYS.c.version), 0) + 1)
        for _ in range(_ATTEMPTS):
            try:
                with self._store.writing() as connection:
                    return connection.execute(statement(connection.execute(number).scalar_one())).rowcount
            except IntegrityError:
                continue
            except DATABASE_ERRORS as error:
                raise _unavailable() from error
        raise _unavailable()


class Keyring:
    """The keys in memory, kept up to date by a thread of its own.

    Args:
        salted: whether each key has a cache of its own.
    """

    def __init__(self, keys: Keys, salted: bool = True) -> None:
        self.keys = keys
        self._salted = salted
        self._known: dict[str, tuple[Key, Principal]] = {}
        self._version = 0
        self._refreshing = threading.Lock()
        self._away = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keyring", daemon=True)

    def start(self) -> None:
        """Reads the keys, and goes on reading what changes.

        Raises:
            UnavailableError: ``database_unavailable``; without it no key is known yet.
        """
        self.refresh()
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def refresh(self) -> None:
        """Reads what has changed.

        Raises:
            UnavailableError: ``database_unavailable``; what is known stays known.
        """
        with self._refreshing:
            for key in self.keys.changed_after(self._version):
                self._known[key.id] = key, self._principal(key)
                self._version = key.version

    def recognize(self, secret: str) -> Principal | None:
        """Whose key this is; None for one that is unknown, expired or revoked."""
        form = _FORM.fullmatch(secret)
        key, principal = self._known.get(form[1], (None, None)) if form else (None, None)
        given, now = _hash(secret), self.keys.now()
        # All comparisons are made and take the same time, so the time tells nothing about how near a guess was.
        new = hmac.compare_digest(given, key.hash if key else _NOBODY)
        old = hmac.compare_digest(given, (key.old_hash if key else None) or _NOBODY)
        if key is None or key.status(now) != "active":
            return None
        return principal if new or (old and now < (key.old_until or 0.0)) else None

    def current(self, principal: Principal) -> Principal | None:
        """What somebody who was let in earlier may now; None when the key is good no more."""
        key, known = self._known.get(principal.key_id, (None, None))
        return known if key is not None and key.status(self.keys.now()) == "active" else None

    def _principal(self, key: Key) -> Principal:
        spec = key.spec
        salt = key.salt if self._salted else ""
        return Principal(key.id, spec.name, spec.scopes, spec.models, spec.priority, spec.limits, salt)

    def _run(self) -> None:
        while not self._closing.wait(REFRESH_S):
            try:
                self.refresh()
                if self._away:
                    _logger.warning("the database of keys is back")
                self._away = False
            except UnavailableError as error:
                if not self._away:
                    _logger.warning("%s Keys that are known stay good; changes are not seen.", error.message)
                self._away = True


def limits_of(values: Mapping[str, Any]) -> Limits:
    """Limits from their names and numbers.

    Raises:
        RequestError: ``invalid_parameter``.
    """
    known = {field.name for field in dataclasses.fields(Limits)}
    for name, value in values.items():
        if name not in known:
            raise RequestError("invalid_parameter", f"There is no limit {name!r}. {did_you_mean(name, known)}", name)
        allowed = (int, float) if name == "dollars_per_day" else (int,)
        if value is not None and (isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < 2**53):
            raise _invalid(name, "a positive number, or left out for no limit")
    return Limits(**values)


def _from_row(row: Mapping[Any, Any]) -> Key:
    spec = KeySpec(
        name=row["name"],
        scopes=frozenset(json.loads(row["scopes"])),
        models=None if row["models"] is None else frozenset(json.loads(row["models"])),
        priority=row["priority"],
        limits=Limits(**json.loads(row["limits"])),
        owner=row["owner"],
        note=row["note"],
        expires=row["expires"],
    )
    return Key(
        id=row["id"],
        spec=spec,
        created=row["created"],
        revoked=row["revoked"],
        hash=row["hash"],
        old_hash=row["old_hash"],
        old_until=row["old_until"],
        salt=row["salt"],
        version=row["version"],
    )


def _secret(key_id: str) -> str:
    return f"tm-{key_id}-{secrets.token_urlsafe(32)}"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _invalid(field: str, rule: str) -> RequestError:
    return RequestError("invalid_parameter", f"{field} must be {rule}.", field)


def _unavailable() -> UnavailableError:
    return UnavailableError("database_unavailable", "The database of keys cannot be reached now. Try again.")
