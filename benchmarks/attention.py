"""Paged attention beside what this machine can do, measured in the same run.

    python benchmarks/attention.py [--threads N] [--json FILE]

16 query heads, 8 KV heads, 128 wide, blocks of 16 tokens in random order, as in a model of Qwen3-0.6B's shape, and the
cache of 28 layers, so that nothing is found in the processor's own. Decode is held against the read bandwidth (bytes of
keys, values and scales), prefill against the bf16 peak (operations of what causality leaves). The types of cache take
turns; times are medians of one layer with the first and third quartile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from kernels import Ceilings, measure_ceilings
from rich.console import Console
from rich.table import Table

from tokenmill import device
from tokenmill.kernels.cpu import _native
from tokenmill.kernels.cpu.attention_ops import PackedCache
from tokenmill.kernels.memory import zeros
from tokenmill.models.spec import kv_row_bytes

Q_HEADS, KV_HEADS, WIDTH, BLOCK = 16, 8, 128, 16
LAYERS = 28
FORMATS = {"bf16": torch.bfloat16, "int8": torch.int8}
SECONDS = 1.0
"""Of each measurement; at least three rounds."""
SHAPES = ((1, 1, 1024), (1, 1, 8192), (8, 1, 200), (32, 1, 200), (16, 1, 1024), (1, 1024, 1024), (1, 512, 4096))
"""Sequences, queries of each, and context of each, the queries included."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One layer's attention."""

    format: str
    sequences: int
    queries: int
    context: int
    seconds: float
    quartiles: tuple[float, float]

    @property
    def bytes(self) -> int:
        """Of the keys and values that must be read."""
        return 2 * self.sequences * self.context * KV_HEADS * kv_row_bytes(WIDTH, 2, self.format == "int8")

    @property
    def operations(self) -> int:
        """Of both products, for what a query may see."""
        seen = self.queries * self.context - self.queries * (self.queries - 1) // 2
        return 4 * self.sequences * Q_HEADS * WIDTH * seen

    def of_ceiling(self, ceilings: Ceilings) -> float:
        """The time that the ceilings allow over the time it took."""
        return max(self.bytes / ceilings.read, self.operations / ceilings.bf16) / self.seconds


def measure(sequences: int, queries: int, context: int) -> list[Result]:
    """The same attention over each type of cache."""
    blocks = -(-context // BLOCK)
    table = (1 + torch.randperm(sequences * blocks)).view(sequences, blocks).int()
    q = torch.randn(sequences * queries, Q_HEADS, WIDTH).bfloat16()
    starts = torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32)
    lengths = torch.full((sequences,), context, dtype=torch.int32)
    layers = {format: [filled(1 + sequences * blocks, format) for _ in range(LAYERS)] for format in FORMATS}
    times: dict[str, list[float]] = {format: [] for format in FORMATS}

    def seconds(format: str) -> float:
        start = time.perf_counter()
        for layer in layers[format]:
            layer.attend(q, table, starts, lengths, WIDTH**-0.5, None, None)
        return (time.perf_counter() - start) / LAYERS

    end = time.perf_counter() + SECONDS * len(FORMATS)
    while time.perf_counter() < end or len(times["bf16"]) < 4:
        for format in FORMATS:
            times[format].append(seconds(format))
    results = []
    for format, taken in times.items():
        low, middle, high = statistics.quantiles(taken[1:], n=4, method="inclusive")  # the first one warms up
        results.append(Result(format, sequences, queries, context, middle, (low, high)))
    return results


def filled(blocks: int, format: str) -> PackedCache:
    """A cache as the engine makes it, full of random keys and values."""
    kind = FORMATS[format]
    row = kv_row_bytes(WIDTH, kind.itemsize, format == "int8") // kind.itemsize
    cache = PackedCache(*(zeros((blocks, KV_HEADS, BLOCK, row), kind) for _ in range(2)))
    for first in range(0, blocks * BLOCK, 4096):
        slots = torch.arange(first, min(first + 4096, blocks * BLOCK))
        keys, values = (torch.randn(len(slots), KV_HEADS, WIDTH).bfloat16() for _ in range(2))
        cache.write(keys, values, slots)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine = device.machine()
    parser.add_argument("--threads", type=int, default=machine.cores)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _native.set_thread_count(options.threads)
    ceilings = measure_ceilings()
    results = [result for shape in SHAPES for result in measure(*shape)]

    table = Table(title=f"attention, {_native.isa()}, {options.threads} threads")
    for heading in ("sequences", "queries", "context", "cache", "µs", "quartiles", "GB/s", "Gop/s", "of ceiling"):
        table.add_column(heading, justify="right")
    for one in results:
        rates = (f"{one.bytes / one.seconds / 1e9:.1f}", f"{one.operations / one.seconds / 1e9:.0f}")
        sizes = (str(one.sequences), str(one.queries), str(one.context), one.format)
        low, high = (f"{each * 1e6:.0f}" for each in one.quartiles)
        table.add_row(*sizes, f"{one.seconds * 1e6:.0f}", f"{low} to {high}", *rates, f"{one.of_ceiling(ceilings):.0%}")
    console = Console()
    console.print(table)
    console.print(f"Ceilings: read {ceilings.read / 1e9:.1f} GB/s, bf16 {ceilings.bf16 / 1e9:.0f} G operations/s")
    if options.json is not None:
        record = {
            "machine": dataclasses.asdict(machine),
            "isa": _native.isa(),
            "threads": options.threads,
            "ceilings": dataclasses.asdict(ceilings),
            "results": [dataclasses.asdict(one) for one in results],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
