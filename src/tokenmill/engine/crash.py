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

__all__ = ["STACKS", "ending", "write_report"]

STACKS = "stacks.txt"
"""File in the engine's folder that its fault handler writes to."""

_KEPT = 20
"""Reports; older ones are deleted, for an engine that crashes over and over would fill the disk."""


def ending(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def write_report(
    target: Path, engine: Path, *, reason: str, status: int, config: EngineConfig, stats: EngineStats, requests: JSON
) -> Path:
    """Writes ``crash-<time>.json`` and returns its path.

    Args:
        target: folder of the reports; made if it is missing.
        engine: folder of the engine process, with its journal and stacks.
        requests: what is known about the open requests, by their id.

    Raises:
        OSError: the report cannot be written.
    """
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
    target.mkdir(parents=True, exist_ok=True)
    name = time.strftime("crash-%Y%m%dT%H%M%S", time.gmtime()) + f"-{time.time_ns() // 1_000_000 % 1000:03}"
    file = target / f"{name}.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))
    for old in sorted(target.glob("crash-*.json"))[:-_KEPT]:
        old.unlink(missing_ok=True)
    return file
