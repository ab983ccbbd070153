"""The native linear layers beside what this machine can do, measured in the same run.

    python benchmarks/kernels.py [--threads N] [--rows 1,6,32,256] [--json FILE] [--plot FILE.svg]

The plot (needs the extra `plot`) shows each product below the machine's roofline: operations per second over operations
per byte of weights. Each line gives the time of one product, the bytes of packed weights read and the operations done
per second, and what part of the nearer ceiling that is: memory read or dot products, whichever allows less. Weights are
cycled through more memory than caches hold. Times are medians; the ceilings are measured before and after, and the
better reading counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tokenmill import device
from tokenmill.kernels.cpu import _native
from tokenmill.kernels.cpu.packed import Format, PackedWeight, pack

SHAPES = ((1024, 3072), (3072, 1024), (1024, 151_936))
"""Inputs and outputs: a layer's products and the head of a model of Qwen3-0.6B's shape."""
FORMATS: tuple[Format, ...] = ("bf16", "int8", "int4")
CYCLED_BYTES = 1 << 30
SECONDS = 0.3
"""Of each measurement."""


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Bytes and operations (a multiplication and an addition are two) per second."""

    read: float
    bf16: float
    int8: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One product of `rows` activations [rows, inputs] with a weight [outputs, inputs]."""

    format: str
    inputs: int
    outputs: int
    rows: int
    seconds: float
    bytes: int

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    def of_ceiling(self, ceilings: Ceilings) -> float:
        """The time that the ceilings allow over the time it took."""
        peak = ceilings.bf16 if self.format == "bf16" else ceilings.int8
        return max(self.bytes / ceilings.read, self.operations / peak) / self.seconds


def median_seconds(call: Callable[[], object]) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def measure_ceilings() -> Ceilings:
    memory = torch.ones(CYCLED_BYTES, dtype=torch.uint8)
    rounds = 100_000
    return Ceilings(
        read=CYCLED_BYTES / median_seconds(lambda: _native.read_memory(memory.data_ptr(), CYCLED_BYTES)),
        bf16=_native.peak_bf16(1) * rounds / median_seconds(lambda: _native.peak_bf16(rounds)),
        int8=_native.peak_int8(1) * rounds / median_seconds(lambda: _native.peak_int8(rounds)),
    )


def measure(format: Format, inputs: int, outputs: int, rows: list[int]) -> list[Result]:
    first = pack(torch.randn(outputs, inputs), format)
    weights = [first]
    while len(weights) * first.nbytes < CYCLED_BYTES:
        copies = {name: tensor.clone() for name, tensor in first.tensors.items()}
        weights.append(PackedWeight(format, outputs, inputs, False, first.group, copies))
    results = []
    for count in rows:
        x, out = torch.randn(count, inputs).bfloat16(), torch.empty(count, outputs, dtype=torch.bfloat16)
        used = weights if count <= 64 else weights[:4]

        def call(x: torch.Tensor = x, out: torch.Tensor = out, used: list[PackedWeight] = used) -> None:
            for weight in used:
                weight.linear(x, out)

        results.append(Result(format, inputs, outputs, count, median_seconds(call) / len(used), first.nbytes))
    return results


def plot(results: list[Result], ceilings: Ceilings, title: str, file: Path) -> None:
    """The roofline with each product as a dot, logarithmic both ways."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise SystemExit("--plot needs matplotlib: pip install 'tokenmill[plot]'") from None
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [one.operations / one.bytes for one in results]
    ends = [min(intensities) / 1.5, max(intensities) * 1.5]
    for name, peak, style in (("int8 peak", ceilings.int8, "-"), ("bf16 peak", ceilings.bf16, "--")):
        corner = peak / ceilings.read
        line = [min(ends[0], corner), corner, max(ends[1], corner)]
        axes.plot(line, [min(peak, x * ceilings.read) / 1e9 for x in line], style, color="0.5", zorder=1)
        axes.annotate(f"{name} {peak / 1e9:,.0f} Gop/s", (ends[1], peak / 1e9), ha="right", va="bottom", color="0.35")
    axes.annotate(
        f"read {ceilings.read / 1e9:.0f} GB/s", (ends[0], ends[0] * ceilings.read / 1e9), ha="left", va="top",
        color="0.35", xytext=(16, 8), textcoords="offset points",
    )  # fmt: skip
    for format, marker, colour in (("bf16", "o", "#1f77b4"), ("int8", "s", "#d95f02"), ("int4", "^", "#1b9e77")):
        those = [one for one in results if one.format == format]
        axes.scatter(
            [one.operations / one.bytes for one in those], [one.operations / one.seconds / 1e9 for one in those],
            marker=marker, color=colour, label=format, zorder=2,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="Gop/s", title=title)
    axes.grid(which="both", alpha=0.15)
    axes.legend(loc="lower right")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine = device.machine()
    parser.add_argument("--threads", type=int, default=machine.cores)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 6, 32, 256])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    _native.set_thread_count(options.threads)

    before = measure_ceilings()
    results = [
        result
        for format in FORMATS
        for inputs, outputs in SHAPES
        for result in measure(format, inputs, outputs, [n for n in options.rows if n * outputs < 1 << 23])
    ]
    after = measure_ceilings()
    ceilings = Ceilings(max(before.read, after.read), max(before.bf16, after.bf16), max(before.int8, after.int8))

    table = Table(title=f"{_native.isa()}, {options.threads} threads")
    for heading in ("format", "inputs", "outputs", "rows", "µs", "GB/s", "Gop/s", "of ceiling"):
        table.add_column(heading, justify="right")
    for one in results:
        rates = (f"{one.seconds * 1e6:.1f}", f"{one.bytes / one.seconds / 1e9:.1f}")
        speed, part = f"{one.operations / one.seconds / 1e9:.0f}", f"{one.of_ceiling(ceilings):.0%}"
        table.add_row(one.format, str(one.inputs), str(one.outputs), str(one.rows), *rates, speed, part)
    console = Console()
    console.print(table)
    for name, reading in (("before", before), ("after", after)):
        console.print(
            f"Ceilings {name}: read {reading.read / 1e9:.1f} GB/s, bf16 {reading.bf16 / 1e9:.0f} and "
            f"int8 {reading.int8 / 1e9:.0f} G operations/s"
        )
    if options.plot is not None:
        plot(results, ceilings, f"Linear layers, {_native.isa()}, {options.threads} threads", options.plot)
    if options.json is not None:
        record = {
            "machine": dataclasses.asdict(machine),
            "isa": _native.isa(),
            "threads": options.threads,
            "ceilings": {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)},
            "results": [dataclasses.asdict(one) for one in results],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
