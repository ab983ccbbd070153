"""The lines of a batch's files: requests that are read and checked, answers that are appended and found again.

Source: https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tokenmill.types import JSON

__all__ = ["BadLine", "Journal", "Line", "Usage", "check_lines", "read_lines"]

MOST_LINES = 50_000
LONGEST_LINE = 32 * 2**20
"""Bytes; no request over HTTP is longer by default either."""
_MOST_FAULTS = 100
"""A file that is wrong throughout is told so in this many lines."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One request of a batch."""

    number: int
    """From 1."""
    custom_id: str
    body: JSON


@dataclasses.dataclass(frozen=True)
class BadLine:
    """What is wrong with a line."""

    number: int | None
    code: str
    message: str
    field: str | None

    def to_json(self) -> JSON:
        """An entry of OpenAI's ``errors.data``."""
        return {"code": self.code, "line": self.number, "message": self.message, "param": self.field}


def read_lines(path: Path, endpoint: str) -> Iterator[Line | BadLine]:
    """The requests of an input file, one at a time. Empty lines are passed over."""
    with path.open("rb") as file:
        number = 0
        while data := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(data) > LONGEST_LINE:
                yield BadLine(number, "line_too_long", f"The line is longer than {LONGEST_LINE} bytes.", None)
                return  # where the next line begins is not worth reading on for
            if data.strip():
                yield _line(number, data, endpoint)


def check_lines(path: Path, endpoint: str) -> tuple[int, str | None, list[BadLine]]:
    """Reads an input file once.

    Returns:
        How many requests there are, the model that the first one names, and what is wrong with the file.
    """
    seen: set[str] = set()
    faults: list[BadLine] = []
    model: str | None = None
    for line in read_lines(path, endpoint):
        if isinstance(line, BadLine):
            faults.append(line)
        elif line.custom_id in seen:
            faults.append(
                BadLine(
                    line.number,
                    "duplicate_custom_id",
                    f"custom_id {line.custom_id!r} was used before; each line needs its own.",
                    "custom_id",
                )
            )
        else:
            if not seen and isinstance(line.body.get("model"), str):
                model = line.body["model"]
            seen.add(line.custom_id)
        if len(seen) > MOST_LINES:
            faults.append(BadLine(None, "too_many_lines", f"A batch has at most {MOST_LINES} requests.", None))
        if len(faults) >= _MOST_FAULTS or len(seen) > MOST_LINES:
            break
    if not seen and not faults:
        faults.append(BadLine(None, "empty_file", "The file holds no request.", None))
    return len(seen), model, faults


def _line(number: int, data: bytes, endpoint: str) -> Line | BadLine:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        return BadLine(number, "invalid_json_line", f"The line is not JSON: {error}.", None)
    if not isinstance(value, dict):
        return BadLine(number, "invalid_json_line", "The line is not a JSON object.", None)
    custom_id, method, url, body = (value.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        return BadLine(number, "missing_parameter", "custom_id must be a text that is not empty.", "custom_id")
    if method != "POST":
        return BadLine(number, "invalid_method", "method must be 'POST'.", "method")
    if url != endpoint:
        return BadLine(number, "invalid_url", f"url must be the batch's endpoint, {endpoint!r}.", "url")
    if not isinstance(body, dict):
        return BadLine(number, "missing_parameter", "body must be a JSON object.", "body")
    return Line(number, custom_id, body)


class Journal:
    """A file to which answers are appended, each at once and whole.

    A line that a killed process did not finish writing is cut off when the file is opened again.

    Args:
        path: made when it is not there.
        usage: to which the answers that are there already add what they used.
    """

    def __init__(self, path: Path, usage: Usage) -> None:
        self.path = path
        self.custom_ids: set[str] = set()
        """Requests that have an answer here."""
        self.count = 0
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._length = 0
        with path.open("a+b") as file:
            file.seek(0)
            for data in file:
                if not data.endswith(b"\n"):
                    break
                entry = msgspec.json.decode(data)
                self.custom_ids.add(entry["custom_id"])
                self.count += 1
                usage.add(entry["response"])
                self._length += len(data)
            file.truncate(self._length)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, custom_id: str, response: JSON | None, error: JSON | None) -> None:
        """Adds an answer.

        Raises:
            OSError: it could not be written, and nothing of it is in the file.
        """
        entry = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
        data = msgspec.json.encode(entry) + b"\n"
        try:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(None, "the disk is full")
        except OSError:
            os.ftruncate(self._file, self._length)
            raise
        self._length += len(data)
        self.custom_ids.add(custom_id)
        self.count += 1

    def close(self) -> None:
        """Brings everything to the disk."""
        os.fsync(self._file)
        os.close(self._file)


class Usage:
    """Tokens of a batch's answers, whichever endpoint gave them."""

    def __init__(self) -> None:
        self._prompt = self._cached = self._completion = self._reasoning = 0

    def add(self, response: JSON | None) -> None:
        """Counts the answer to one request; refusals have used nothing."""
        used = (response or {}).get("body", {}).get("usage") or {}
        self._prompt += used.get("prompt_tokens", used.get("input_tokens", 0))
        self._completion += used.get("completion_tokens", used.get("output_tokens", 0))
        of_prompt = used.get("prompt_tokens_details") or used.get("input_tokens_details") or {}
        of_completion = used.get("completion_tokens_details") or used.get("output_tokens_details") or {}
        self._cached += of_prompt.get("cached_tokens", 0)
        self._reasoning += of_completion.get("reasoning_tokens", 0)

    def to_json(self) -> JSON:
        """OpenAI's ``usage`` of a batch."""
        return {
            "input_tokens": self._prompt,
            "input_tokens_details": {"cached_tokens": self._cached},
            "output_tokens": self._completion,
            "output_tokens_details": {"reasoning_tokens": self._reasoning},
            "total_tokens": self._prompt + self._completion,
        }
