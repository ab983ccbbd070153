"""Real PostgreSQL and Redis servers for tests: on a free port, in a temporary folder, stopped and started at will."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def program(name: str) -> str:
    """The path of a program. Without it the test is skipped, but not where CI is set."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), Path("/usr/local/bin"), Path("/opt/homebrew/bin")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, sorted(places, reverse=True))])
    found = shutil.which(name, path=path)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed")
    return found


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Service:
    """A server process that can be stopped and started again with its data."""

    def __init__(self, command: list[str], port: int, user: int | None = None) -> None:
        self.port = port
        self._command = command
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=self._user
        )
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, f"{self._command[0]} ended with {self._process.returncode}"
            assert time.monotonic() < deadline, f"{self._command[0]} does not answer"
            time.sleep(0.02)

    def stop(self, kill: bool = False) -> None:
        if self._process is None:
            return
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        self._process.wait(60)
        self._process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """While it lasts the server takes connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
            return True
        return False


class Redis(Service):
    def __init__(self, folder: Path) -> None:
        port = free_port()
        flags = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
        super().__init__([program("redis-server"), *flags], port)
        self.url = f"redis://127.0.0.1:{port}/0"


class Postgres(Service):
    """PostgreSQL refuses to run as root, so root lends it another user."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        user = None
        if os.getuid() == 0:
            user = next(pwd.getpwnam(name).pw_uid for name in ("postgres", "nobody") if _is_user(name))
            os.chown(folder, user, -1)
        data = folder / "data"
        initdb = [program("initdb"), "-D", str(data), "-U", "tester", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, user=user)
        flags = ["-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-c", "shared_buffers=16MB"]
        super().__init__([program("postgres"), *flags], port, user)
        self.url = f"postgresql://tester@127.0.0.1:{port}/postgres"

    def start(self) -> None:
        super().start()
        ready = [program("pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        while subprocess.run(ready).returncode != 0:
            time.sleep(0.02)

    def stop(self, kill: bool = False) -> None:
        if self._process is not None and not kill:
            self._process.send_signal(signal.SIGINT)  # "fast": ends the sessions rather than waiting for them
        super().stop(kill)


def _is_user(name: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(name))
    return False


@contextlib.contextmanager
def _running(kind: type[Service]) -> Iterator[Service]:
    # Not in pytest's own folder: another user could not reach into it.
    with tempfile.TemporaryDirectory(prefix="tokenmill-", ignore_cleanup_errors=True) as folder:
        service = kind(Path(folder))
        service.start()
        try:
            yield service
        finally:
            service.stop(kill=kind is Redis)


@pytest.fixture(scope="module")
def redis_server() -> Iterator[Redis]:
    with _running(Redis) as service:
        yield service


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[Postgres]:
    with _running(Postgres) as service:
        yield service
