"""A real server in a process of its own, as a user starts it."""

import contextlib
import dataclasses
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import pytest


@dataclasses.dataclass
class Server:
    process: subprocess.Popen
    url: str

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def running_server(model: str, *flags: str) -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        if "--state" not in flags:
            flags = ("--state", stack.enter_context(tempfile.TemporaryDirectory()), *flags)
        command = [sys.executable, "-m", "tokenmill", "serve", model, "--port", "0", *flags]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        try:
            for line in process.stdout:
                if found := re.search(r"https?://\S+", line):
                    yield Server(process, found.group())
                    break
            else:
                raise AssertionError(f"the server ended with status {process.wait()} before it was ready")
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Server]:
    """A server with the built-in model, shared by the tests of a run."""
    with running_server("demo", "--served-model-name", "demo") as server:
        yield server


@pytest.fixture
def serve() -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """Starts servers of a test's own: ``with serve("demo", "--flag") as server``."""
    return running_server
