"""llama.cpp: its server, asked over HTTP with token ids, streaming. Started anew for each number of slots.

Slots do not share a prefix, and a slot's part of the context is fixed at the start. So a workload gets as many slots as
it has requests, or one slot when its prompts share a long prefix: measured here, one slot that reuses it serves them
sooner than many that each compute it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from drivers import protocol


class LlamaCpp:
    def __init__(self, settings: protocol.Settings) -> None:
        self._settings = settings
        self._program = Path(settings.tools) / "llama-server"
        self._server: subprocess.Popen[bytes] | None = None
        self._slots = (0, 0)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        said = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=True)
        self.versions = {"llama.cpp": (said.stdout + said.stderr).split("version: ")[-1].partition("\n")[0]}
        self.prepare(protocol.Shape(requests=1, tokens=2048, shared_prefix=0))

    def prepare(self, shape: protocol.Shape) -> None:
        slots = 1 if shape.shared_prefix else shape.requests
        tokens = -(-(shape.tokens + 1) // 512) * 512
        if self._slots == (slots, tokens):
            return
        self.stop()
        self._slots = (slots, tokens)
        threads = str(self._settings.threads)
        self._server = subprocess.Popen([
            self._program, "-m", self._settings.model, "-t", threads, "-tb", threads, "-np", str(slots),
            "-c", str(slots * tokens), "-fa", "on", "-b", "2048", "-ub", "512", "--host", "127.0.0.1",
            "--port", str(self._port), "--no-warmup", "--log-disable",
        ])  # fmt: skip
        while not self._healthy():
            if self._server.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._server.returncode}.")
            time.sleep(0.05)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def serve(self, requests: list[protocol.Request]) -> protocol.Served:
        first = [0.0] * len(requests)
        tokens = [0] * len(requests)
        bodies = [
            json.dumps({
                "prompt": ids, "n_predict": count, "ignore_eos": True, "temperature": 0, "samplers": [],
                "stream": True, "cache_prompt": True, "return_tokens": True,
            })
            for ids, count in requests
        ]  # fmt: skip
        began = time.perf_counter()

        def one(row: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port)
            connection.request("POST", "/completion", bodies[row], {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    first[row] = first[row] or time.perf_counter() - began
                    event = json.loads(line[6:])
                    if event.get("stop"):
                        tokens[row] = event["tokens_predicted"]
            connection.close()

        threads = [threading.Thread(target=one, args=(row,)) for row in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return protocol.Served(time.perf_counter() - began, first, tokens)

    def stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait()


@contextlib.contextmanager
def load(settings: protocol.Settings) -> Iterator[LlamaCpp]:
    peer = LlamaCpp(settings)
    try:
        yield peer
    finally:
        peer.stop()


if __name__ == "__main__":
    protocol.main(load)
