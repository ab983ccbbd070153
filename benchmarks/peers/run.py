"""tokenmill beside its rivals on the same model, token ids, threads and precision, taking turns in one run.

    python benchmarks/peers/run.py [--precision bf16|int8|int4] [--peers tokenmill,llamacpp,...] [--workloads w1,w2,...]
                                   [--repeats 5] [--limit SECONDS] [--resume] [--root FOLDER] [--json]

Peers must have been set up by install.py. All of them are loaded at once; each stands still while another is measured.
Before every measurement the machine's read bandwidth and peak rates are read. Results, with all samples, are written to
benchmarks/results/peers_PRECISION_ISA.json after every measurement, so that --resume goes on where a run was ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import places

sys.path.insert(0, str(places.HERE.parent))

from common import RESULTS, manifest, token_ids
from driver import Driver, PeerError, environment
from drivers.protocol import Settings
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from table import Sample, against_best_rival, left, spread, summary
from work import DEMO, QWEN3, WORKLOADS, Workload, find

from tokenmill import device
from tokenmill.kernels.probe import native_isa

LENGTHS = {QWEN3: (8448, 32), DEMO: (2048, 64)}
"""Longest sequence and most requests at once, by model."""
KV_GIB = 2
LEFT_OUT = {"transformers": "has no quantized CPU path of its own"}


@dataclasses.dataclass
class Run:
    """What is asked for, and what there is so far."""

    root: Path
    precision: str
    threads: int
    repeats: int
    limit: float
    samples: list[Sample]
    versions: dict[str, dict[str, str]]
    left_out: dict[str, str]

    def start(self, peer: str, model: str) -> Driver:
        """Starts a peer with a model, or the ceilings."""
        path = places.hugging_face(self.root, model)
        if peer != "ceilings":
            path = places.model(self.root, model, peer, self.precision) or path
        max_len, max_requests = LENGTHS[model]
        settings = Settings(
            str(path), self.precision, self.threads, max_len, max_requests, KV_GIB, str(places.tools(self.root))
        )
        log = self.root / "logs" / f"{peer}-{model}-{self.precision}.log"
        variables = environment(self.root, peer, KV_GIB, self.threads)
        driver = Driver(peer, places.python(self.root, peer), settings, log, variables)
        driver.pause()
        self.versions[peer] = driver.versions
        return driver

    def add(self, workload: str, peer: str, figures: dict[str, float], took: float, ceilings: dict[str, float]) -> None:
        repeat = sum((each["workload"], each["peer"]) == (workload, peer) for each in self.samples)
        self.samples.append({
            "workload": workload, "peer": peer, "repeat": repeat, "figures": figures, "took": took,
            "ceilings": ceilings,
        })  # fmt: skip

    def left(self, workload: Workload, peer: str) -> range:
        return left(self.samples, workload.name, peer, self.repeats, self.limit)


def cold(run: Run, peer: str, model: str, ceilings: Driver) -> Driver:
    """Starts a peer, times it to its first token, then warms it up on a few shapes."""
    read = read_ceilings(ceilings)
    began = time.perf_counter()
    driver = run.start(peer, model)
    driver.serve([(token_ids(7, 128), 1)])
    took = time.perf_counter() - began
    figures = {"start to first token": took, "peak memory": driver.peak_memory()}
    run.add(f"start {model}", peer, figures, took, read)
    driver.serve([(token_ids(8, 600), 8)])
    return driver


def measure(run: Run, workload: Workload, repeat: int, driver: Driver, ceilings: Driver) -> None:
    """One turn of one peer."""
    began = time.perf_counter()
    driver.prepare(workload.shape)
    # Other numbers than any timed request, so that nothing of them can be found in a cache.
    driver.serve([(token_ids(9_000_000 + repeat, 32), 4)])
    if warm := workload.warm(repeat):
        driver.serve(warm)
    read = read_ceilings(ceilings)
    driver.forget_peak_memory()
    requests = workload.requests(repeat)
    served = driver.serve(requests)
    figures = {metric.name: metric.of(served, requests) for metric in workload.metrics}
    figures["peak memory"] = driver.peak_memory()
    run.add(workload.name, driver.name, figures, time.perf_counter() - began, read)


def read_ceilings(ceilings: Driver) -> dict[str, float]:
    """Bytes and operations per second of the machine now."""
    return dict(zip(("read", "bf16", "int8"), ceilings.serve([]).first, strict=True))


def measure_model(
    run: Run, model: str, peers: list[str], workloads: list[Workload], save: Callable[[], None], progress: Progress
) -> None:
    """All workloads of one model, the peers taking turns."""
    peers = [peer for peer in peers if any(run.left(workload, peer) for workload in workloads)]
    if not peers:
        return
    task = progress.add_task(model, total=len(peers) + run.repeats * len(peers) * len(workloads))
    drivers: dict[str, Driver] = {}
    ceilings = run.start("ceilings", model)

    def attempt(peer: str, action: Callable[[], Driver | None]) -> None:
        try:
            drivers[peer] = action() or drivers[peer]
        except PeerError as error:
            run.left_out[f"{peer}, {model}"] = str(error)
            if peer in drivers:
                drivers.pop(peer).stop()

    try:
        for peer in peers:
            progress.update(task, description=f"{model}: starting {peer}")
            attempt(peer, partial(cold, run, peer, model, ceilings))
            progress.advance(task)
        for workload in workloads:
            for repeat in range(run.repeats):
                for turn in range(len(peers)):
                    peer = peers[(repeat + turn) % len(peers)]  # nobody is always the first
                    progress.update(task, description=f"{workload.name}: {peer}")
                    if peer in drivers and repeat in run.left(workload, peer):
                        attempt(peer, partial(measure, run, workload, repeat, drivers[peer], ceilings))
                        save()
                    progress.advance(task)
    finally:
        for driver in (ceilings, *drivers.values()):
            driver.stop()


def result(run: Run) -> dict[str, Any]:
    """What is written: the manifest, what was measured, how it compares, and every sample."""
    figures = summary(run.samples)
    versus: dict[str, dict[str, Any]] = {}
    for workload, metrics in figures.items():
        for metric, peers in metrics.items():
            medians = {peer: values["median"] for peer, values in peers.items()}
            if found := against_best_rival(medians, metric):
                versus.setdefault(workload, {})[metric] = {"best rival": found[0], "ratio": found[1]}
    machine = device.machine()
    return {
        "manifest": manifest()
        | {
            "precision": run.precision,
            "threads": run.threads,
            "kv_gib": KV_GIB,
            "instruction_sets": machine.instruction_sets,
            "peers": run.versions,
        },
        "workloads": {name: WORKLOADS[name].title for name in figures if name in WORKLOADS},
        "left out": run.left_out,
        "ceilings": {
            name: spread([sample["ceilings"][name] for sample in run.samples]) for name in ("read", "bf16", "int8")
        },
        "figures": figures,
        "tokenmill against the best rival": versus,
        "samples": run.samples,
    }


def show(run: Run, console: Console) -> None:
    """Prints medians with their range, by workload and metric, and the ratio."""
    done = result(run)
    peers = [peer for peer in places.PEERS if any(sample["peer"] == peer for sample in run.samples)]
    table = Table(title=f"{run.precision}, {run.threads} threads: median (least to most, repeats)")
    for heading in ("workload", "metric", *peers, "tokenmill / best rival"):
        table.add_column(heading)
    for workload, metrics in done["figures"].items():
        for metric, values in metrics.items():
            cells = [
                "{median:.4g} ({min:.3g} to {max:.3g}, {n})".format(**values[peer]) if peer in values else "-"
                for peer in peers
            ]
            found = done["tokenmill against the best rival"].get(workload, {}).get(metric)
            table.add_row(workload, metric, *cells, "{ratio:.2f} ({best rival})".format(**found) if found else "-")
    console.print(table)
    console.print("A ratio above 1 is tokenmill ahead, of times and memory too.")
    for name, unit in (("read", "GB/s read"), ("bf16", "bf16 Gop/s"), ("int8", "int8 Gop/s")):
        values = {key: value / 1e9 for key, value in done["ceilings"][name].items()}
        console.print(f"{values['median']:.1f} {unit} ({values['min']:.1f} to {values['max']:.1f})")
    for peer, reason in run.left_out.items():
        console.print(f"Left out: {peer}: {reason}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"type": lambda text: text.split(",")}
    parser.add_argument("--precision", choices=places.PRECISIONS, default="bf16")
    parser.add_argument("--peers", **names, default=list(places.PEERS))
    parser.add_argument("--workloads", **names, default=["w1", "w2", "w3", "w4", "w5", "w6"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for one peer's repeats of one workload")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep the samples of the last run, measure what lacks")
    parser.add_argument("--root", type=Path, default=places.ROOT)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    if unknown := [peer for peer in options.peers if peer not in places.PEERS]:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(places.PEERS)}")
    try:
        workloads = find(options.workloads)
    except KeyError as error:
        parser.error(f"no such workload: {error.args[0]}; there are {', '.join(WORKLOADS)}")
    file = RESULTS / f"peers_{options.precision}_{native_isa()}.json"
    before = json.loads(file.read_text()) if options.resume and file.exists() else None
    run = Run(
        options.root.resolve(), options.precision, options.threads, options.repeats, options.limit,
        before["samples"] if before else [], before["manifest"]["peers"] if before else {}, {},
    )  # fmt: skip
    peers = []
    for peer in options.peers:
        if places.model(run.root, QWEN3, peer, run.precision) is None:
            run.left_out[peer] = LEFT_OUT[peer]
        else:
            peers.append(peer)

    def save() -> None:
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(result(run), indent=1) + "\n")

    # Ended from outside, it still has to end the peers, which would stand still for ever.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with Progress(console=Console(stderr=True)) as progress:
        for model in (QWEN3, DEMO):
            chosen = [workload for workload in workloads if workload.model == model]
            measure_model(run, model, peers, chosen, save, progress)
    save()
    if options.json:
        print(file.read_text(), end="")
    else:
        show(run, Console())


if __name__ == "__main__":
    main()
