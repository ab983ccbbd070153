"""The team of threads that all native operators share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenmill.kernels.cpu._native")

from tokenmill.kernels.cpu import _native
from tokenmill.kernels.cpu.packed import PackedWeight, pack


@pytest.fixture(autouse=True)
def two_threads() -> Any:
    before = _native.thread_count()
    _native.set_thread_count(2)
    yield
    _native.set_thread_count(before)


@pytest.fixture
def work() -> tuple[PackedWeight, Tensor, Tensor]:
    """A weight, rows and the right answer."""
    source = torch.Generator().manual_seed(0)
    packed = pack(torch.randn(256, 128, generator=source), "int8")
    x = torch.randn(40, 128, generator=source).bfloat16()
    return packed, x, packed.linear(x)


def threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


def test_the_count_is_at_least_one() -> None:
    for asked, given in ((0, 1), (-3, 1), (1, 1), (5, 5)):
        _native.set_thread_count(asked)
        assert _native.thread_count() == given


def test_changing_the_count_keeps_results(work: tuple[PackedWeight, Tensor, Tensor]) -> None:
    packed, x, right = work
    for count in (1, 4, 2, 7, 1, 3):
        _native.set_thread_count(count)
        for _ in range(3):
            assert torch.equal(packed.linear(x), right)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_workers_are_kept_and_those_no_longer_wanted_end(work: tuple[PackedWeight, Tensor, Tensor]) -> None:
    packed, x, _ = work
    _native.set_thread_count(1)
    packed.linear(x)
    before = threads_of_this_process()
    _native.set_thread_count(4)
    for _ in range(3):
        packed.linear(x)
        assert threads_of_this_process() == before + 3
    _native.set_thread_count(1)
    packed.linear(x)
    assert threads_of_this_process() == before


def test_calls_from_several_python_threads(work: tuple[PackedWeight, Tensor, Tensor]) -> None:
    packed, x, right = work
    wrong: list[int] = []

    def call(index: int) -> None:
        rows = slice(index, None)
        wrong.extend(index for _ in range(100) if not torch.equal(packed.linear(x[rows]), right[rows]))

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for _ in range(20):
        _native.set_thread_count(1)
        _native.set_thread_count(3)
    for caller in callers:
        caller.join()
    assert wrong == []


_FORK = """
import os, threading, torch
from tokenmill.kernels.cpu import _native
from tokenmill.kernels.cpu.packed import pack

_native.set_thread_count(2)
packed = pack(torch.randn(256, 128), "bf16")
x = torch.randn(40, 128).bfloat16()
right = packed.linear(x)
done = threading.Event()

def busy():
    while not done.is_set():
        packed.linear(x)

other = threading.Thread(target=busy)
other.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(packed.linear(x), right) for _ in range(5)) else 1)
    assert os.waitpid(child, 0)[1] == 0
assert torch.equal(packed.linear(x), right)
done.set()
other.join()
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_fork_works_even_if_the_parent_was_computing() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout == "fine\n", result.stderr
