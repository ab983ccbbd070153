"""The engine's latest events where they outlast its process.

After each step what is new is appended to a file as JSON lines; two files take turns, so that their size is bounded.
The pages belong to the operating system as soon as they are written: a killed process loses none of them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from tokenmill.engine.events import Event, EventLog
from tokenmill.types import JSON

__all__ = ["Journal", "read_journal"]

_LIMIT = 4 * 2**20
"""Bytes of one file; some forty thousand events."""

_NAMES = ("events.old", "events.new")
_encode = msgspec.json.Encoder().encode_lines
_logger = logging.getLogger(__name__)


class Journal:
    """Writes down what an event log gets.

    Args:
        folder: where the two files are; it must exist.
        limit: bytes after which a file is closed and the older one dropped.
    """

    def __init__(self, folder: Path, log: EventLog, limit: int = _LIMIT) -> None:
        self._old, self._new = (folder / name for name in _NAMES)
        self._log = log
        self._limit = limit
        self._written = 0
        self._size = 0
        self._file = self._new.open("wb", buffering=0)

    def write(self) -> None:
        """Appends the events that are new since the last time."""
        if self._log.total == self._written:
            return
        lines = _encode(self._log.since(self._written))
        self._written = self._log.total
        try:
            self._file.write(lines)
            self._size += len(lines)
            if self._size > self._limit:
                self._turn()
        except OSError as error:  # a full disk must not end the engine
            _logger.warning("events are not written down: %s", error)

    def _turn(self) -> None:
        self._file.close()
        self._new.replace(self._old)
        self._file = self._new.open("wb", buffering=0)
        self._size = 0


def read_journal(folder: Path) -> list[JSON]:
    """What a journal in `folder` holds, oldest first. A line that was cut off by a crash is left out."""
    fields = Event.__struct_fields__
    events: list[JSON] = []
    for name in _NAMES:
        file = folder / name
        for line in file.read_bytes().splitlines() if file.exists() else ():
            try:
                values: Any = msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue
            events.append(dict(zip(fields, values, strict=True)))
    return events
