"""The engine in a process of its own: ``python -m tokenmill.engine.process FOLDER``.

Tokenizing, templating and streaming happen in the client's process, so that none of it ever delays a step. The two talk
over one ZeroMQ pair socket in FOLDER, which also holds what outlasts a crash: the journal of events, and the stacks of
all threads when a signal ends the process (see `tokenmill.engine.crash`).
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from pathlib import Path

import zmq

from tokenmill.device import machine
from tokenmill.engine import messages
from tokenmill.engine.admission import Admission
from tokenmill.engine.crash import STACKS
from tokenmill.engine.engine import Engine
from tokenmill.engine.executor import LocalExecutor
from tokenmill.engine.journal import Journal
from tokenmill.engine.outbox import Outbox
from tokenmill.errors import RequestError, TokenmillError, UnavailableError
from tokenmill.types import ErrorInfo

__all__ = ["main"]

_IDLE_POLL_MS = 500  # how soon an idle engine notices that its client is gone
_BLOCKED_POLL_MS = 2  # how soon it looks again when requests wait but none may run yet


class _Loop:
    """Answers commands and steps the engine in between."""

    def __init__(self, socket: zmq.Socket[bytes], folder: Path) -> None:
        self._socket = socket
        self._folder = folder
        self._parent = os.getppid()
        self._open = True
        self._outbox = Outbox(time.monotonic, machine().cores)

    def run(self) -> None:
        start = messages.decode_command(self._socket.recv())
        try:
            executor = LocalExecutor(start.config, lambda done, total: self._send(messages.Loading(done, total)))
            self._engine = Engine(start.config, executor)
        except TokenmillError as error:
            info = ErrorInfo(error.code, error.message, error.field)
            return self._send(messages.Failed(type(error).__name__, info))
        except Exception as error:
            logging.getLogger(__name__).exception("the engine could not start")
            return self._send(messages.Failed("EngineError", ErrorInfo("engine_start_failed", str(error))))
        self._admission = Admission(self._engine.scheduler, start.config.scheduler.max_waiting, time.monotonic)
        journal = Journal(self._folder, self._engine.events)
        self._send(messages.Ready(self._engine.stats()))
        blocked = False
        while self._open and os.getppid() == self._parent:
            idle = not self._engine.has_work
            self._commands(_IDLE_POLL_MS if idle else _BLOCKED_POLL_MS if blocked else 0)
            if self._open and self._engine.has_work:
                blocked = not self._step()
            journal.write()
            self._report()
        return None

    def _step(self) -> bool:
        """Lets the engine step; returns whether it could."""
        before = self._engine.events.step
        outputs = self._engine.step()
        stepped = self._engine.events.step > before
        if stepped or outputs:
            self._admission.ended(outputs)
            self._outbox.put(outputs, self._engine.last_step if stepped else None)
        return stepped

    def _report(self) -> None:
        if self._outbox.due(idle=not self._engine.has_work):
            self._send(self._outbox.take(self._engine.stats()))

    def _commands(self, timeout_ms: int) -> None:
        """Answers what has arrived; waits up to `timeout_ms` for the first."""
        while self._open and self._socket.poll(timeout_ms):
            self._answer(messages.decode_command(self._socket.recv()))
            timeout_ms = 0

    def _answer(self, command: messages.Command) -> None:
        match command:
            case messages.Add(request):
                try:
                    self._admission.check(request)
                    self._engine.add(request)
                except (RequestError, UnavailableError) as error:
                    later = error.retry_after_s if isinstance(error, UnavailableError) else None
                    info = ErrorInfo(error.code, error.message, error.field, later)
                    self._send(messages.Refused(request.request_id, info))
            case messages.Abort(request_ids):
                self._outbox.put(self._engine.abort(request_ids))
            case messages.AskEvents(request_id):
                log = self._engine.events
                self._send(messages.Events(request_id, log.of(request_id) if request_id else list(log)))
            case messages.Stop():
                self._open = False
            case messages.Start():
                raise RuntimeError("the engine was started twice")

    def _send(self, report: messages.Report) -> None:
        self._socket.send(messages.encode(report))


def main() -> None:
    """Serves the client that waits in the folder given as the only argument until it says stop or disappears."""
    folder = Path(sys.argv[1])
    # Ctrl-C reaches the whole process group; the client decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="tokenmill engine: %(levelname)s: %(message)s")
    with (folder / STACKS).open("w") as stacks, zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        faulthandler.enable(stacks)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(messages.address_in(folder))
        _Loop(socket, folder).run()


if __name__ == "__main__":
    main()
