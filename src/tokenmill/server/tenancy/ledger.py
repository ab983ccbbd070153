"""The usage ledger: one line per request, written in batches by a thread of its own.

Serving never waits for it and never fails with it. While the database is away or full, lines are kept in memory; when
there are many they are appended to a file in the state folder, and from there they reach the database later. Only when
that file cannot be written either, and the memory set aside is full, are lines lost, and then they are counted.

A line is named by its request, and the database takes each name once. So whatever is uncertain is simply tried again.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import fcntl
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec
import sqlalchemy

from tokenmill.errors import UnavailableError
from tokenmill.server.tenancy.store import DATABASE_ERRORS, USAGE, Store, told
from tokenmill.types import JSON, Clock

__all__ = ["Entry", "Ledger", "NoLedger", "Recorder"]

_logger = logging.getLogger(__name__)

_TICK_S = 0.5
"""How long a line may wait in memory while all is well."""
_BATCH = 500
_BOUND = 20_000
"""Lines in memory, a few megabytes."""
_LONGEST_PAUSE_S = 10.0
_PRUNE_EVERY_S = 3600.0


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line. The names are the columns of the table."""

    request_id: str
    finished: float
    """Seconds since 1970."""
    key_id: str
    model: str
    endpoint: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    rejected_tokens: int
    """Drafted tokens that the model did not confirm."""
    queue_s: float | None
    first_token_s: float | None
    total_s: float
    dollars: float
    finish: str
    error_code: str

    def row(self) -> JSON:
        """As the table takes it."""
        return msgspec.structs.asdict(self) | {"day": _day(self.finished)}


class Recorder(Protocol):
    """Who takes lines."""

    @property
    def pending(self) -> int:
        """Lines that are in memory only."""

    @property
    def lost(self) -> int:
        """Lines that were given up."""

    def record(self, entry: Entry) -> None:
        """Takes a line; returns at once."""

    def close(self) -> None:
        """Brings everything to safety."""


class NoLedger:
    """Writes nothing down."""

    pending = 0
    lost = 0

    def record(self, entry: Entry) -> None:
        """Forgets it."""

    def close(self) -> None:
        """Nothing is open."""


class Ledger:
    """Writes lines to the database.

    Args:
        spill: the file for lines that the database cannot take now. Several servers may share it.
        keep_days: rows older than so many days are deleted.
        bound: how many lines are kept in memory at most.
        now: seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        spill: Path,
        keep_days: int,
        bound: int = _BOUND,
        clock: Clock = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._spill = _SpillFile(spill)
        self._keep_days = keep_days
        self._bound = bound
        self._clock = clock
        # Setting the machine's clock ahead must not delete what is young, so it is read but once.
        self._epoch = now() - clock()
        self._queue: collections.deque[Entry] = collections.deque()
        """Filled by those who serve, emptied by the thread."""
        self._taken: list[Entry] = []
        """What the thread took from there and has not written yet."""
        self._lost = 0
        self._losing = threading.Lock()
        self._failures = 0
        self._retry_at = float("-inf")
        self._prune_at = float("-inf")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        return len(self._queue) + len(self._taken)

    @property
    def lost(self) -> int:
        return self._lost

    def record(self, entry: Entry) -> None:
        if self.pending >= self._bound:
            self._lose(1)
        else:
            self._queue.append(entry)

    def close(self) -> None:
        """Writes what is left, to the database or to the file."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_TICK_S):
            self._work(ask=self._clock() >= self._retry_at, enough=self._bound // 2)
        self._work(ask=True, enough=0)
        self._lose(self.pending)

    def _work(self, ask: bool, enough: int) -> None:
        """One round: to the database if it may be asked, and what is more than `enough` to the file."""
        self._take()
        try:
            if not (ask and self._to_database()) and len(self._taken) > enough:
                self._to_file()
        except Exception:
            _logger.exception("the ledger failed; it goes on")

    def _to_database(self) -> bool:
        """Whether everything is in the database now."""
        try:
            self._store.migrate()
            self._write()
            unreadable = self._spill.drain(self._write)
            self._prune()
        except (UnavailableError, *DATABASE_ERRORS) as error:
            if not self._failures:
                _logger.warning("usage cannot be written to the database now and is kept: %s", told(error))
            self._retry_at = self._clock() + min(_LONGEST_PAUSE_S, _TICK_S * 2**self._failures)
            self._failures = min(self._failures + 1, 10)
            return False
        if self._failures:
            _logger.warning("usage is written to the database again")
        self._failures = 0
        self._lose(unreadable)
        return True

    def _take(self) -> None:
        while self._queue:
            self._taken.append(self._queue.popleft())

    def _write(self, older: Sequence[Entry] = ()) -> None:
        """Writes lines from the file and all that are in memory: emptying a long file must not let memory fill up."""
        if older:
            self._insert(older)
            self._take()
        while self._taken:
            self._insert(self._taken[:_BATCH])
            del self._taken[:_BATCH]

    def _to_file(self) -> None:
        try:
            self._spill.append(self._taken)
        except OSError as error:
            _logger.warning("usage cannot be written to %s either: %s", self._spill.path, error)
        else:
            self._taken.clear()

    def _insert(self, entries: Sequence[Entry]) -> None:
        with self._store.writing() as connection:
            self._store.insert_new(connection, USAGE, [entry.row() for entry in entries])

    def _prune(self) -> None:
        if self._clock() >= self._prune_at:
            oldest = _day(self._epoch + self._clock() - self._keep_days * 86_400)
            with self._store.writing() as connection:
                connection.execute(sqlalchemy.delete(USAGE).where(USAGE.c.day < oldest))
            self._prune_at = self._clock() + _PRUNE_EVERY_S

    def _lose(self, count: int) -> None:
        with self._losing:
            if count and not self._lost:
                _logger.error("usage is lost: neither the database nor the file takes it")
            self._lost += count


class _SpillFile:
    """Lines as JSON, appended by whoever cannot reach the database, and emptied by whoever can.

    Processes take turns by a lock on the file. Emptying it removes it, so one that waited for the lock looks whether
    the file it holds is still the one with that name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entries: list[Entry]) -> None:
        """Adds all of them or, when it raises OSError, none."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lines = b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)
        with self._locked() as descriptor:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            try:
                while lines:
                    lines = lines[os.write(descriptor, lines) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise

    def drain(self, insert: Callable[[list[Entry]], None]) -> int:
        """Hands everything to `insert` and removes the file. Returns how many lines could not be read."""
        unreadable = 0

        def entries(file: BinaryIO) -> Iterator[Entry]:
            nonlocal unreadable
            for line in file:
                try:
                    yield msgspec.json.decode(line, type=Entry)
                except msgspec.DecodeError:
                    unreadable += 1

        if not self.path.exists():
            return 0
        with self._locked() as descriptor, open(descriptor, "rb", closefd=False) as file:
            for batch in _batches(entries(file)):
                insert(batch)
            self.path.unlink()
        return unreadable

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink:
                    yield descriptor
                    return
            finally:
                os.close(descriptor)


def _batches(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    while batch := list(itertools.islice(entries, _BATCH)):
        yield batch


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()
