"""Not an engine: reads what this machine can do right now, on request, through tokenmill's own loops.

The answer's `first` holds bytes read per second, bf16 and int8 operations per second by the fastest instructions that
the kernels use here, each the best of three short tries. A process of its own, so that its memory and threads are not
the measuring process's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
from drivers import protocol

from tokenmill.kernels.cpu import _native

READ_BYTES = 1 << 30
ROUNDS = 200_000


class Ceilings:
    versions: dict[str, str]

    def __init__(self, settings: protocol.Settings) -> None:
        _native.set_thread_count(settings.threads)
        self._memory = np.ones(READ_BYTES, dtype=np.uint8)
        self.versions = {"isa": _native.isa()}

    def prepare(self, shape: protocol.Shape) -> None:
        pass

    def serve(self, requests: list[protocol.Request]) -> protocol.Served:
        began = time.perf_counter()
        read = READ_BYTES / least_seconds(lambda: _native.read_memory(self._memory.ctypes.data, READ_BYTES))
        bf16 = ROUNDS * _native.peak_bf16(1) / least_seconds(lambda: _native.peak_bf16(ROUNDS))
        int8 = ROUNDS * _native.peak_int8(1) / least_seconds(lambda: _native.peak_int8(ROUNDS))
        return protocol.Served(time.perf_counter() - began, [read, bf16, int8], [])


def least_seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


@contextlib.contextmanager
def load(settings: protocol.Settings) -> Iterator[Ceilings]:
    yield Ceilings(settings)


if __name__ == "__main__":
    protocol.main(load)
