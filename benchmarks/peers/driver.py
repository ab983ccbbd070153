"""A peer's process as the measuring one sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import places
import psutil
from drivers.protocol import Request, Served, Settings, Shape

TIMEOUT_S = 900.0


class PeerError(Exception):
    """A peer could not be started, ended, hung or did not generate what it was asked for."""


class Driver:
    """A driver's process. It stands still (SIGSTOP) except while it is spoken to, so that no peer waits actively on a
    core that another one is measured on.

    Args:
        log: file for what the peer itself has to say.

    Raises:
        PeerError: the peer did not become ready.
    """

    def __init__(self, name: str, python: Path, settings: Settings, log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(places.HERE), os.environ.get("PYTHONPATH", "")]
        # -P: the drivers' folder must not be searched for modules, since they are named like what they import.
        command = [python, "-P", places.HERE / "drivers" / f"{name}.py", json.dumps(dataclasses.asdict(settings))]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment,
            )  # fmt: skip
        try:
            self.versions: dict[str, str] = self._answer()["ready"]
        except PeerError:
            self.stop()
            raise

    def prepare(self, shape: Shape) -> None:
        """Tells the peer what comes next."""
        with self._awake():
            self._ask({"prepare": dataclasses.asdict(shape)})

    def serve(self, requests: Sequence[Request]) -> Served:
        """Has the peer complete requests.

        Raises:
            PeerError: it failed, or a request did not get as many tokens as it asked for.
        """
        with self._awake():
            served = Served(**self._ask({"serve": requests}))
        if self.name != "ceilings" and served.tokens != [tokens for _, tokens in requests]:
            raise PeerError(f"{self.name} generated {served.tokens} tokens.")
        return served

    def forget_peak_memory(self) -> None:
        """From here on `peak_memory` counts anew."""
        for process in self._processes():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_memory(self) -> float:
        """The most resident memory of the peer's processes, added up, in GiB."""
        kib = 0
        for process in self._processes():
            status = Path(f"/proc/{process.pid}/status").read_text()
            kib += int(status.partition("VmHWM:")[2].split()[0])
        return kib / 2**20

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def stop(self) -> None:
        """Ends the peer and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)
            cast(Any, self._process.stdin).close()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        if self._process.poll() is not None:
            raise PeerError(f"{self.name} has ended; see {self._log}")
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.pause()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        stdin = cast(Any, self._process.stdin)
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"{self.name} has ended; see {self._log}") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next line; the peer only ever writes one per command, so that nothing waits in a buffer."""
        stdout = cast(Any, self._process.stdout)
        readable, _, _ = select.select([stdout], [], [], TIMEOUT_S)
        line = stdout.readline() if readable else ""
        if not line:
            last = self._log.read_text().strip().splitlines()[-1:] or ["without a word"]
            raise PeerError(f"{self.name} {'ended' if readable else 'hung'}: {last[0][:300]}")
        return cast(dict[str, Any], json.loads(line))

    def _processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]


def environment(root: Path, peer: str, kv_gib: int, threads: int) -> dict[str, str]:
    """Environment variables that a peer has to be started with."""
    if peer != "vllm":
        return {"HF_HUB_OFFLINE": "1"}
    preload = ["/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", str(root / "vllm" / "env" / "lib" / "libiomp5.so")]
    return {
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(preload),
        "TORCHINDUCTOR_CACHE_DIR": str(root / "vllm" / "inductor"),
        "VLLM_CACHE_ROOT": str(root / "vllm" / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
