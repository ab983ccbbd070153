"""Batches: files of requests that are answered in the gaps of live traffic.

A line goes the way of a request over HTTP, through the same endpoint, and its answer is appended to the output file at
once. So a batch that a killed process left goes on with the lines that have no answer yet.

Source: https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from tokenmill.errors import RequestError, UnavailableError
from tokenmill.server.batch.batch_lines import BadLine, Journal, Line, Usage, check_lines, read_lines
from tokenmill.server.batch.files import BATCH_FILES_KEPT_S, Files, new_file_id
from tokenmill.server.batch.loopback import Answer, Loopback
from tokenmill.server.errors import body_of
from tokenmill.server.principal import Principal
from tokenmill.server.schemas.batches import BatchRequest
from tokenmill.server.state import State, Stored
from tokenmill.types import JSON

__all__ = ["PRIORITY", "Batches"]

PRIORITY = -(2**40)
"""Of every line: lower than any live request, and far enough from the limits of 64 bits to add a key's own."""

_KIND = "batch"
_FINAL = ("completed", "failed", "expired", "cancelled")
_STEPS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
_GAP_S = 0.05
"""How often a line that waits for a gap looks for one."""
_AGAIN_S = 1.0
"""After this long a line that could not be taken now is asked again, and what the disk refused is written again."""
_TRIES = 3
"""How often a line is asked whose answer is that the server failed."""
_SAVE_S = 1.0
"""How often the counts of a running batch are written down."""

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Batches:
    """The batches of all owners.

    Args:
        ask: the endpoints.
        waiting: how many requests wait for the engine.
        names: of the models that are served here; a batch of another server in the same folder is left to it.
        concurrency: how many lines may be under way.
    """

    def __init__(
        self,
        state: State,
        files: Files,
        ask: Loopback,
        waiting: Callable[[], int],
        names: tuple[str, ...],
        concurrency: int,
    ) -> None:
        self._state = state
        self._files = files
        self._ask = ask
        self._waiting = waiting
        self._names = names
        self._places = asyncio.Semaphore(concurrency)
        self._runs: dict[str, _Run] = {}

    async def start(self) -> None:
        """Goes on with the batches that a server before this one left."""
        for stored in await asyncio.to_thread(self._state.abandoned, _KIND):
            ours = stored.private["model"] in self._names or stored.body["expires_at"] <= time.time()
            if ours and await asyncio.to_thread(self._state.claim, stored):
                self._launch(stored)

    async def close(self) -> None:
        """Stops; what is not finished goes on with the next server."""
        runs = list(self._runs.values())
        for run in runs:
            run.task.cancel()
        await asyncio.gather(*(run.task for run in runs), return_exceptions=True)

    async def create(self, request: BatchRequest, principal: Principal) -> JSON:
        """A new batch, which begins at once.

        Raises:
            RequestError: ``not_found`` when there is no such file; ``invalid_parameter`` when it is for something else.
        """
        owner = principal.key_id
        source = await asyncio.to_thread(self._files.get, request.input_file_id, owner, "input_file_id")
        if source.body["purpose"] != "batch":
            raise RequestError(
                "invalid_parameter", "The input file must have been uploaded with purpose 'batch'.", "input_file_id"
            )
        batch_id, now = f"batch_{uuid.uuid4().hex}", int(time.time())
        body: JSON = {
            "id": batch_id,
            "object": "batch",
            "endpoint": request.endpoint,
            "model": None,
            "errors": None,
            "input_file_id": request.input_file_id,
            "completion_window": request.completion_window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + request.window_s,
            **{f"{step}_at": None for step in _STEPS},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "usage": None,
            "metadata": request.metadata,
        }
        kept = request.output_expires_after
        private: JSON = {
            "principal": msgspec.to_builtins(principal),
            "model": self._names[0],
            "output": new_file_id(),
            "errors": new_file_id(),
            "expires_s": BATCH_FILES_KEPT_S if kept is None else kept.seconds,
        }
        await asyncio.to_thread(self._state.insert, _KIND, batch_id, owner, body, private=private, held=True)
        self._launch(Stored(batch_id, owner, self._state.holder, None, body, private))
        return body

    async def get(self, batch_id: str, owner: str) -> JSON:
        """A batch as it is now.

        Raises:
            RequestError: ``not_found``.
        """
        return self._now(await asyncio.to_thread(self._state.get, _KIND, batch_id, owner, "batch_id"))

    async def page(self, owner: str, after: str | None, limit: int) -> tuple[list[JSON], bool]:
        """A part of the owner's batches, the newest first, and whether there are more."""
        page = await asyncio.to_thread(lambda: self._state.page(_KIND, owner, after=after, limit=limit, order="desc"))
        return [self._now(stored) for stored in page.items], page.has_more

    async def cancel(self, batch_id: str, owner: str) -> JSON:
        """Begins to end a batch; the answers that are there stay.

        Raises:
            RequestError: ``not_found``; ``invalid_state`` when it has ended.
            UnavailableError: ``held_elsewhere`` when another process works on it.
        """
        stored = await asyncio.to_thread(self._state.get, _KIND, batch_id, owner, "batch_id")
        body = self._now(stored)
        if body["status"] in _FINAL:
            raise RequestError("invalid_state", f"The batch is {body['status']} already.", "batch_id")
        run = self._runs.get(batch_id)
        if run is None:
            if not await asyncio.to_thread(self._state.claim, stored):
                raise UnavailableError("held_elsewhere", "Another server works on this batch; ask that one.")
            run = self._launch(stored)
        run.cancel()
        return dict(run.body)

    def _now(self, stored: Stored) -> JSON:
        run = self._runs.get(stored.id)
        return stored.body if run is None else run.body

    def _launch(self, stored: Stored) -> _Run:
        run = _Run(self, stored)
        self._runs[stored.id] = run
        run.task = asyncio.create_task(self._finish(run))
        return run

    async def _finish(self, run: _Run) -> None:
        try:
            await run.run()
        except Exception:
            _logger.exception("batch %s failed", run.body["id"])
            fault = BadLine(None, "internal_error", "The server failed; its log says more.", None)
            await run.fail([fault])
        finally:
            del self._runs[run.body["id"]]


class _Run:
    """One batch while this process works on it."""

    task: asyncio.Task[None]

    def __init__(self, batches: Batches, stored: Stored) -> None:
        self._state, self._files = batches._state, batches._files
        self._ask, self._waiting, self._places = batches._ask, batches._waiting, batches._places
        self.body = stored.body
        self._owner = stored.owner
        self._private = stored.private
        self._principal = msgspec.convert(stored.private["principal"], Principal)
        self._cancelled = asyncio.Event()
        self._usage = Usage()
        self._saved_at = 0.0
        if self.body["status"] == "cancelling":
            self._cancelled.set()

    def cancel(self) -> None:
        """Asks for an early end."""
        if self.body["status"] != "cancelling":
            self._step("cancelling")
        self._cancelled.set()

    async def run(self) -> None:
        """From wherever it is to its end."""
        source = self._files.path(self.body["input_file_id"])
        if self.body["status"] == "validating":
            try:
                total, model, faults = await asyncio.to_thread(check_lines, source, self.body["endpoint"])
            except FileNotFoundError:
                total, model, faults = 0, None, [_gone()]
            if faults:
                await self.fail(faults)
                return
            self.body["model"] = model
            self.body["request_counts"]["total"] = total
            if not self._cancelled.is_set():
                self._step("in_progress")
            await self._save()
        output = await self._journal("output")
        errors = await self._journal("errors")
        try:
            ending = "completed"
            if self.body["status"] in ("in_progress", "cancelling"):
                ending = await self._answer_all(source, output, errors)
                if ending == "completed":
                    self._step("finalizing")
                    await self._save()
        finally:
            await asyncio.to_thread(output.close)
            await asyncio.to_thread(errors.close)
        for journal, name in ((output, "output"), (errors, "error")):
            self.body[f"{name}_file_id"] = await asyncio.to_thread(self._publish, journal, name)
        self.body["usage"] = self._usage.to_json()
        self._step(ending)
        await self._save()

    async def fail(self, faults: list[BadLine]) -> None:
        """Ends it because of the input file."""
        self.body["errors"] = {"object": "list", "data": [fault.to_json() for fault in faults]}
        self._step("failed")
        await self._save()

    async def _journal(self, name: str) -> Journal:
        path = self._files.path(self._private[name])
        journal = await self._until_written(lambda: Journal(path, self._usage))
        self.body["request_counts"]["completed" if name == "output" else "failed"] = journal.count
        return journal

    def _publish(self, journal: Journal, name: str) -> str | None:
        """Makes a file of answers one of the owner's files, if there are any."""
        if not journal.count:
            journal.path.unlink(missing_ok=True)
            return None
        title = f"{self.body['id']}_{name}.jsonl"
        file_id = journal.path.name
        self._files.register(file_id, title, "batch_output", self._owner, self._private["expires_s"])
        return file_id

    async def _answer_all(self, source: Path, output: Journal, errors: Journal) -> str:
        """Answers the lines that have no answer yet; returns how the batch ends."""
        if not source.exists():
            self.body["errors"] = {"object": "list", "data": [_gone().to_json()]}
            return "failed"
        done = output.custom_ids | errors.custom_ids
        lines = (
            line
            for line in read_lines(source, self.body["endpoint"])
            if isinstance(line, Line) and line.custom_id not in done
        )
        working = asyncio.create_task(self._work(lines, output, errors))
        stopped = asyncio.create_task(self._cancelled.wait())
        try:
            remaining = max(0.0, self.body["expires_at"] - time.time())
            await asyncio.wait((working, stopped), timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return "completed"
        finally:
            for task in (working, stopped):
                task.cancel()
            await asyncio.gather(working, stopped, return_exceptions=True)
        if self._cancelled.is_set():
            return "cancelled"
        await self._expire(source, output, errors)
        return "expired"

    async def _work(self, lines: Iterator[Line], output: Journal, errors: Journal) -> None:
        async with asyncio.TaskGroup() as group:
            while (line := await asyncio.to_thread(next, lines, None)) is not None:
                await self._places.acquire()
                try:
                    while self._waiting():
                        await asyncio.sleep(_GAP_S)
                except asyncio.CancelledError:
                    self._places.release()
                    raise
                group.create_task(self._answer(line, output, errors)).add_done_callback(
                    lambda _: self._places.release()
                )

    async def _answer(self, line: Line, output: Journal, errors: Journal) -> None:
        answer = await self._asked(line)
        response: JSON = {
            "status_code": answer.status,
            "request_id": answer.request_id,
            "body": msgspec.json.decode(answer.body),
        }
        good = answer.status < 400
        await self._until_written(lambda: (output if good else errors).append(line.custom_id, response, None))
        self._usage.add(response)
        self.body["request_counts"]["completed" if good else "failed"] += 1
        if time.monotonic() - self._saved_at > _SAVE_S:
            await self._save()

    async def _asked(self, line: Line) -> Answer:
        """The endpoint's answer. "Not now" is asked again until it is now; a failure of the server a few times."""
        for name in ("stream", "background"):
            if line.body.get(name):
                error = RequestError("unsupported_parameter", f"A line of a batch cannot have {name}.", name)
                return Answer(400, uuid.uuid4().hex, msgspec.json.encode(body_of(error)))
        data = msgspec.json.encode(line.body)
        tries = 0
        while True:
            answer = await self._ask.post(self.body["endpoint"], data, self._principal, PRIORITY)
            tries += answer.status not in (429, 503)
            if (answer.status < 500 and answer.status != 429) or tries == _TRIES:
                return answer
            await asyncio.sleep(_AGAIN_S)

    async def _expire(self, source: Path, output: Journal, errors: Journal) -> None:
        """Tells of each line without an answer that its time is over."""
        error: JSON = {"code": "batch_expired", "message": "The completion window ended before this request was run."}
        done = output.custom_ids | errors.custom_ids
        for line in read_lines(source, self.body["endpoint"]):
            if isinstance(line, Line) and line.custom_id not in done:
                entry = line.custom_id
                await self._until_written(lambda entry=entry: errors.append(entry, None, error))  # type: ignore[misc]
                self.body["request_counts"]["failed"] += 1

    async def _until_written(self, write: Callable[[], T]) -> T:
        """Does `write`; when the disk refuses it, waits for room."""
        while True:
            try:
                return write()
            except OSError as error:
                _logger.warning("batch %s waits for the disk: %s", self.body["id"], error)
            await asyncio.sleep(_AGAIN_S)

    def _step(self, status: str) -> None:
        self.body["status"] = status
        self.body[f"{status}_at"] = int(time.time())

    async def _save(self) -> None:
        self._saved_at = time.monotonic()
        held = self.body["status"] not in _FINAL
        body = copy.deepcopy(self.body)  # it goes on changing while a thread writes it
        while True:
            try:
                await asyncio.to_thread(self._state.update, self.body["id"], body, held=held)
                return
            except UnavailableError as error:
                _logger.warning("batch %s cannot be written down: %s", self.body["id"], error.message)
            if held:
                return  # it is written again before long
            await asyncio.sleep(_AGAIN_S)


def _gone() -> BadLine:
    return BadLine(None, "not_found", "The input file was deleted.", "input_file_id")
