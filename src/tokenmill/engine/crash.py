"""What is known about an engine process that ended unasked, written down for whoever looks into it.

A report is one JSON file: how the process ended, the configuration, the state after the last step, which requests were
open and how far they were, the last minutes of the scheduler's and the cache's decisions, and the stacks of all threads
if the process could still write them. It holds no text of a prompt or an answer.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import msgspec

from tokenmill.config import flatten
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.journal import read_journal
from tokenmill.types import JSON, EngineStats

__all__ = ["NO_REPORTS", "STACKS", "Reports", "ending"]

STACKS = "stacks.txt"
"""File in the engine's folder that its fault handler writes to."""


def ending(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


class Reports:
    """A folder of crash reports.

    Args:
        folder: made when the first report is written.
        kept: how many are kept; older ones are deleted, for an engine that crashes over and over would fill the disk.
            0 writes none.
    """

    def __init__(self, folder: Path, kept: int) -> None:
        self._folder = folder
        self._kept = kept

    def write(
        self, engine: Path, *, reason: str, status: int, config: EngineConfig, stats: EngineStats, requests: JSON
    ) -> Path | None:
        """Writes ``crash-<time>.json`` and returns its path, if any is written.

        Args:
            engine: folder of the engine process, with its journal and stacks.
            requests: what is known about the open requests, by their id.

        Raises:
            OSError: the report cannot be written.
        """
        if not self._kept:
            return None
        stacks = engine / STACKS
        content = {
            "time": time.time(),
            "monotonic": time.monotonic(),  # the clock of the events
            "reason": reason,
            "ended_by": ending(status),
            "config": flatten(config),
            "stats": stats,
            "requests": requests,
            "events": read_journal(engine),
            "stacks": stacks.read_text("utf-8", "replace") if stacks.exists() else "",
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        name = time.strftime("crash-%Y%m%dT%H%M%S", time.gmtime()) + f"-{time.time_ns() // 1_000_000 % 1000:03}"
        file = self._folder / f"{name}.json"
        file.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))
        for old in sorted(self._folder.glob("crash-*.json"))[: -self._kept]:
            old.unlink(missing_ok=True)
        return file


NO_REPORTS = Reports(Path(), 0)
