"""What the server keeps about files, batches and responses: a table of objects in SQLite, in the state folder.

An object belongs to the key that made it; for anybody else it does not exist. One on which a process works names that
process as its holder. A holder is alive as long as it has a lock on a file of its own, so what a killed process left
behind is found by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

import msgspec

from tokenmill.errors import RequestError, UnavailableError
from tokenmill.types import JSON

__all__ = ["Order", "Page", "State", "Stored"]

Order = Literal["asc", "desc"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    tag TEXT NOT NULL,
    holder TEXT NOT NULL,
    expires REAL,
    body BLOB NOT NULL,
    private BLOB NOT NULL,
    events BLOB
);
CREATE INDEX IF NOT EXISTS objects_of_owner ON objects (kind, owner, number);
CREATE INDEX IF NOT EXISTS objects_held ON objects (kind, holder) WHERE holder <> '';
CREATE INDEX IF NOT EXISTS objects_expiring ON objects (expires) WHERE expires IS NOT NULL;
"""
_COLUMNS = "id, owner, holder, expires, body, private"
_BUSY_S = 5.0


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object as it is kept."""

    id: str
    owner: str
    """Id of the key that made it; empty without keys."""
    holder: str
    """The process that works on it; empty when none does."""
    expires: float | None
    """When it is deleted, in seconds since 1970."""
    body: JSON
    """What its owner sees."""
    private: JSON
    """What only the server sees."""


@dataclasses.dataclass(frozen=True)
class Page:
    """Part of a list."""

    items: list[Stored]
    has_more: bool


class State:
    """The table of objects. Safe to use from several threads and processes.

    Args:
        folder: made, readable by this user alone, when something is first kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.holder = uuid.uuid4().hex
        """This process, among those that share the folder; another one once it was closed."""
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._sign_of_life: IO[bytes] | None = None

    @property
    def exists(self) -> bool:
        """Whether anything was ever kept in the folder."""
        return (self.folder / "objects.db").exists()

    def insert(
        self,
        kind: str,
        object_id: str,
        owner: str,
        body: JSON,
        *,
        private: JSON | None = None,
        tag: str = "",
        expires: float | None = None,
        held: bool = False,
        events: bytes | None = None,
    ) -> None:
        """Keeps a new object. One with the same id stays as it is.

        Args:
            tag: what a list can be narrowed to.
            held: whether this process works on it.
            events: the stream that made it, to be sent again.
        """
        holder = self.holder if held else ""
        with self._use() as connection:
            connection.execute(
                "INSERT INTO objects (id, kind, owner, tag, holder, expires, body, private, events) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (object_id, kind, owner, tag, holder, expires, _json(body), _json(private or {}), events),
            )

    def get(self, kind: str, object_id: str, owner: str, field: str) -> Stored:
        """An object of `owner`.

        Raises:
            RequestError: ``not_found``, about `field`, also when it is somebody else's.
        """
        with self._use() as connection:
            row = connection.execute(
                f"SELECT {_COLUMNS} FROM objects "
                "WHERE id = ? AND kind = ? AND owner = ? AND (expires IS NULL OR expires > ?)",
                (object_id, kind, owner, time.time()),
            ).fetchone()
        if row is None:
            raise _not_found(kind, object_id, field)
        return _stored(row)

    def events(self, object_id: str) -> bytes | None:
        """The stream that made an object, if it is kept."""
        with self._use() as connection:
            row = connection.execute("SELECT events FROM objects WHERE id = ?", (object_id,)).fetchone()
        return None if row is None else row[0]

    def update(self, object_id: str, body: JSON, *, held: bool, events: bytes | None = None) -> None:
        """Writes the present form of an object on which this process works."""
        with self._use() as connection:
            connection.execute(
                "UPDATE objects SET body = ?, holder = ?, events = coalesce(?, events) WHERE id = ?",
                (_json(body), self.holder if held else "", events, object_id),
            )

    def extend(self, object_ids: Sequence[str], expires: float) -> None:
        """Keeps objects until `expires` at least."""
        with self._use() as connection:
            connection.executemany(
                "UPDATE objects SET expires = max(expires, ?) WHERE id = ? AND expires IS NOT NULL",
                [(expires, object_id) for object_id in object_ids],
            )

    def delete(self, kind: str, object_id: str, owner: str, field: str) -> None:
        """Forgets an object.

        Raises:
            RequestError: ``not_found``.
        """
        with self._use() as connection:
            cursor = connection.execute(
                "DELETE FROM objects WHERE id = ? AND kind = ? AND owner = ?", (object_id, kind, owner)
            )
        if not cursor.rowcount:
            raise _not_found(kind, object_id, field)

    def page(self, kind: str, owner: str, *, after: str | None, limit: int, order: Order, tag: str = "") -> Page:
        """The objects of an owner in the order in which they were made.

        Args:
            after: id of the last object of the page before.
            tag: only objects with this one; empty takes all.

        Raises:
            RequestError: ``not_found`` about ``after``.
        """
        ascending = order == "asc"
        with self._use() as connection:
            number = 0 if ascending else 2**63 - 1
            if after is not None:
                row = connection.execute(
                    "SELECT number FROM objects WHERE id = ? AND kind = ? AND owner = ?", (after, kind, owner)
                ).fetchone()
                if row is None:
                    raise _not_found(kind, after, "after")
                number = row[0]
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM objects WHERE kind = ? AND owner = ? AND tag = coalesce(nullif(?, ''), tag) "
                f"AND (expires IS NULL OR expires > ?) AND number {'>' if ascending else '<'} ? "
                f"ORDER BY number {'ASC' if ascending else 'DESC'} LIMIT ?",
                (kind, owner, tag, time.time(), number, limit + 1),
            ).fetchall()
        return Page([_stored(row) for row in rows[:limit]], len(rows) > limit)

    def abandoned(self, kind: str) -> list[Stored]:
        """Objects whose holder is gone."""
        with self._use() as connection:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM objects WHERE kind = ? AND holder <> '' ORDER BY number", (kind,)
            ).fetchall()
        found = [_stored(row) for row in rows]
        alive = {holder: self._alive(holder) for holder in {each.holder for each in found}}
        return [each for each in found if not alive[each.holder]]

    def claim(self, stored: Stored) -> bool:
        """Makes this process the holder of an abandoned object; False when another one was faster."""
        with self._use() as connection:
            cursor = connection.execute(
                "UPDATE objects SET holder = ? WHERE id = ? AND holder = ?", (self.holder, stored.id, stored.holder)
            )
        return cursor.rowcount == 1

    def sweep(self) -> list[str]:
        """Forgets what has expired; returns the ids. What somebody works on stays."""
        with self._use() as connection:
            rows = connection.execute(
                "DELETE FROM objects WHERE expires <= ? AND holder = '' RETURNING id", (time.time(),)
            ).fetchall()
        return [row[0] for row in rows]

    def close(self) -> None:
        """Closes the database. The holder is gone with it."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._sign_of_life is not None:
                Path(self._sign_of_life.name).unlink(missing_ok=True)
                self._sign_of_life.close()
                self._sign_of_life = None
                self.holder = uuid.uuid4().hex

    @contextlib.contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        """The connection, in a transaction that is committed at the end."""
        with self._lock:
            try:
                connection = self._open()
                with connection:
                    yield connection
            except (sqlite3.Error, OSError) as error:
                raise UnavailableError(
                    "state_unavailable", f"The server's state in {self.folder} cannot be used: {error}."
                ) from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            # What people asked and were answered is nobody else's to read.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            holders = self.folder / "holders"
            holders.mkdir(mode=0o700, exist_ok=True)
            file = self.folder / "objects.db"
            file.touch(mode=0o600)
            connection = sqlite3.connect(file, timeout=_BUSY_S, check_same_thread=False)
            connection.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; {_SCHEMA}")
            self._sign_of_life = (holders / self.holder).open("wb")
            fcntl.flock(self._sign_of_life, fcntl.LOCK_EX)
            self._connection = connection
        return self._connection

    def _alive(self, holder: str) -> bool:
        if holder == self.holder:
            return True
        path = self.folder / "holders" / holder
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        path.unlink(missing_ok=True)
        return False


def _json(value: JSON) -> bytes:
    return msgspec.json.encode(value)


def _stored(row: Sequence[object]) -> Stored:
    object_id, owner, holder, expires, body, private = row
    assert isinstance(body, bytes)
    assert isinstance(private, bytes)
    assert expires is None or isinstance(expires, float)
    return Stored(
        str(object_id), str(owner), str(holder), expires, msgspec.json.decode(body), msgspec.json.decode(private)
    )


def _not_found(kind: str, object_id: str, field: str) -> RequestError:
    return RequestError("not_found", f"There is no {kind} {object_id!r}.", field)
