"""Logs, as text or JSON lines: one line per request, errors, and the life of the server.

What a client wrote and what a model answered is not in them, whatever the level, unless `log_prompts` is on. So an
exception is told by its type and where it was raised, without its message, which may quote what it choked on; and the
libraries we use are heard from warnings on, without what they fill into their messages.
"""

from __future__ import annotations

import datetime
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from tokenmill.server.call import Call, Outcome
from tokenmill.server.observability.record import Record, current
from tokenmill.types import JSON

__all__ = ["Formatter", "RequestLog", "configure", "request_line", "trace_id_of"]

_OURS = ("tokenmill", "uvicorn", "opentelemetry")
"""Loggers whose messages are known to quote nobody."""

_logger = logging.getLogger(__name__)


def configure(style: str, level: str, log_prompts: bool = False) -> None:
    """Sends all logs of this process to stderr.

    Args:
        style: ``text`` or ``json``.
        level: the least level that is shown of us and of uvicorn.
        log_prompts: whether texts of clients and models may appear.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(style, log_prompts))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("tokenmill", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())


class Formatter(logging.Formatter):
    """One line per record. ``extra={"fields": {...}}`` adds fields to it.

    Args:
        style: ``text`` or ``json``.
        log_prompts: whether messages of exceptions and of libraries are shown in full.
    """

    def __init__(self, style: str, log_prompts: bool = False) -> None:
        super().__init__()
        self._line = _as_json if style == "json" else _as_text
        self._open = log_prompts

    def format(self, record: logging.LogRecord) -> str:
        """The line of `record`."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields: JSON = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._message(record),
        }
        request = current()
        if request is not None and request.request_id:
            fields["request_id"] = request.request_id
        fields |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = list(_causes(record.exc_info[1], self._open))
        return self._line(fields)

    def _message(self, record: logging.LogRecord) -> str:
        if self._open or record.name.partition(".")[0] in _OURS:
            return record.getMessage()
        return (str(record.msg).splitlines() or [""])[0]


def _causes(error: BaseException, full: bool) -> Iterator[JSON]:
    """An exception and those it came from, the latest first."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        told: JSON = {"type": type(at).__name__}
        if full:
            told["message"] = str(at)
        elif isinstance(code := getattr(at, "code", None), str):
            told["code"] = code
        frames = traceback.extract_tb(at.__traceback__)
        yield told | {"stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]}
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)


def _as_json(fields: Mapping[str, Any]) -> str:
    return msgspec.json.encode(fields).decode()


def _as_text(fields: Mapping[str, Any]) -> str:
    """Time, level and message as words, the other fields as ``name=value``, the stack on lines of its own."""
    shown = {name: value for name, value in fields.items() if name not in ("time", "level", "message", "error")}
    words = [fields["time"], fields["level"], fields["message"]]
    words += [f"{name}={_word(value)}" for name, value in shown.items()]
    lines = [" ".join(words)]
    for cause in fields.get("error", ()):
        lines.append("    " + " ".join(_word(value) for name, value in cause.items() if name != "stack"))
        lines += ["        " + frame for frame in cause["stack"]]
    return "\n".join(lines)


def _word(value: Any) -> str:
    """A value that cannot be taken for two, nor end the line."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    plain = text.isprintable() and not set(' "=') & set(text)
    return text if plain else msgspec.json.encode(text).decode()


class RequestLog:
    """An interceptor that keeps what the line of a request tells. Calls without an HTTP request get their own line.

    Args:
        log_prompts: whether the line has the prompt's token ids and the parameters as well.
    """

    def __init__(self, log_prompts: bool = False) -> None:
        self._log_prompts = log_prompts

    async def begin(self, call: Call) -> None:
        """Nothing is told before the end."""

    def end(self, call: Call, outcome: Outcome) -> None:
        """Keeps the outcome for the line of the HTTP request, or writes a line where there is none."""
        if self._log_prompts:
            shown = {"request": call.request_id, "prompt": call.prompt, "messages": call.context.get("messages")}
            _logger.info("prompt", extra={"fields": shown})
        record = current()
        if record is not None and record.open:
            record.calls.append((call, outcome))
        else:
            fields = {"endpoint": call.endpoint} | _fields([(call, outcome)])
            _logger.info("request", extra={"fields": fields | {"total_ms": _ms(outcome.seconds)}})


def request_line(record: Record, method: str, path: str, status: int, seconds: float) -> None:
    """Writes the line of an HTTP request that has ended: at ``info``, or ``debug`` when all it did was look."""
    level = logging.INFO if record.calls or record.error_code else logging.DEBUG
    if not _logger.isEnabledFor(level):
        return
    fields: JSON = {"endpoint": path, "method": method, "status": status} | _fields(record.calls)
    fields["total_ms"] = _ms(seconds)
    if record.error_code:
        fields["error_code"] = record.error_code
    _logger.log(level, "request", extra={"fields": fields})


def _fields(calls: Sequence[tuple[Call, Outcome]]) -> JSON:
    """What the calls of one HTTP request (several prompts make several) tell together."""
    if not calls:
        return {}
    first = calls[0][0]
    outcomes = [outcome for _, outcome in calls]
    stats = [each for outcome in outcomes for each in outcome.stats]
    queues = [each.scheduled - each.arrival for each in stats if each.scheduled is not None]
    firsts = [each.first_token - each.arrival for each in stats if each.first_token is not None]
    return {
        "request": first.request_id,
        "key_id": first.principal.key_id,
        "model": first.model,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in outcomes),
        "cached_tokens": sum(outcome.cached_tokens for outcome in outcomes),
        "generated_tokens": sum(outcome.completion_tokens for outcome in outcomes),
        "queue_ms": _ms(max(queues, default=None)),
        "ttft_ms": _ms(min(firsts, default=None)),
        "finish": ",".join(reason for outcome in outcomes for reason in outcome.finish_reasons),
        "error_code": next((outcome.error_code for outcome in outcomes if outcome.error_code), ""),
        "trace_id": trace_id_of(first),
    }


def trace_id_of(call: Call) -> str:
    """The id of the trace that the call is part of; empty when it is part of none."""
    parts = call.trace.get("traceparent", "").split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else ""


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)
