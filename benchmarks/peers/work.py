"""The workloads: token ids, the same for every peer and different in every repeat, so that only what a workload means
to share is found in a prefix cache."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import token_ids
from drivers.protocol import Request, Served, Shape

W3_LENGTHS = (
    (248, 81), (226, 85), (42, 65), (162, 94), (135, 70), (154, 77), (181, 59), (161, 49), (104, 49), (225, 44),
    (190, 64), (168, 122), (239, 109), (69, 71), (57, 125), (50, 119), (116, 92), (175, 44), (122, 87), (112, 110),
    (195, 58), (173, 93), (145, 98), (98, 39), (238, 102), (35, 43), (216, 83), (213, 117), (192, 32), (188, 95),
    (243, 74), (94, 125),
)  # fmt: skip
"""Tokens in and out of each request of w3."""


@dataclass(frozen=True)
class Metric:
    """A figure taken from one served workload."""

    name: str
    unit: str
    of: Callable[[Served, Sequence[Request]], float]


@dataclass(frozen=True)
class Workload:
    """Requests given at once, after others that are served first and not timed."""

    name: str
    title: str
    model: str
    requests: Callable[[int], list[Request]]
    """By the number of the repeat."""
    metrics: tuple[Metric, ...]
    warm: Callable[[int], list[Request]] = lambda repeat: []
    shared_prefix: int = 0

    @property
    def shape(self) -> Shape:
        requests = self.requests(0)
        return Shape(len(requests), max(len(ids) + tokens for ids, tokens in requests), self.shared_prefix)


def _decode(served: Served, requests: Sequence[Request]) -> float:
    return (requests[0][1] - 1) / (served.seconds - served.first[0])


def _prefill(served: Served, requests: Sequence[Request]) -> float:
    return len(requests[0][0]) / served.first[0]


def _output(served: Served, requests: Sequence[Request]) -> float:
    return sum(tokens for _, tokens in requests) / served.seconds


DECODE = Metric("decode", "tokens/s", _decode)
PREFILL = Metric("prefill", "tokens/s", _prefill)
OUTPUT = Metric("output", "tokens/s", _output)
TTFT = Metric("mean time to first token", "s", lambda served, _: statistics.mean(served.first))
SECONDS = Metric("time", "s", lambda served, _: served.seconds)


def _equal(seed: int, count: int, prompt: int, tokens: int) -> Callable[[int], list[Request]]:
    return lambda repeat: [(token_ids(seed + 1000 * repeat + row, prompt), tokens) for row in range(count)]


def _ragged(repeat: int) -> list[Request]:
    return [(token_ids(3_000_000 + 1000 * repeat + row, n), out) for row, (n, out) in enumerate(W3_LENGTHS)]


def _sharing(first: int, count: int) -> Callable[[int], list[Request]]:
    return lambda repeat: [
        (token_ids(4_000_000 + 1000 * repeat, 512) + token_ids(4_000_001 + 1000 * repeat + first + row, 32), 32)
        for row in range(count)
    ]


QWEN3, DEMO = "qwen3-0.6b", "demo"

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("w1", "one stream, 128 in, 128 out", QWEN3, _equal(1_000_000, 1, 128, 128), (DECODE, TTFT)),
        Workload("w2", "prefill of 1,024", QWEN3, _equal(2_000_000, 1, 1024, 1), (PREFILL,)),
        Workload("w3", "32 requests at once", QWEN3, _ragged, (OUTPUT,)),
        Workload(
            "w4", "16 requests sharing 512 tokens", QWEN3, _sharing(1, 16), (SECONDS, TTFT), _sharing(0, 1), 512
        ),
        Workload("w5", "8,192 in, 64 out", QWEN3, _equal(5_000_000, 1, 8192, 64), (PREFILL, DECODE)),
        *(
            Workload(
                f"w6-{count}", f"built-in model, {count} at once, 64 in, 64 out", DEMO,
                _equal(6_000_000 + 100 * count, count, 64, 64), (OUTPUT,),
            )
            for count in (1, 8, 64)
        ),
    )
}  # fmt: skip


def find(names: Sequence[str]) -> list[Workload]:
    """The workloads of these names; `w6` is all of its concurrencies.

    Raises:
        KeyError: there is none of a name.
    """
    expanded = [each for name in names for each in (["w6-1", "w6-8", "w6-64"] if name == "w6" else [name])]
    return [WORKLOADS[name] for name in expanded]
