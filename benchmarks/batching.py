"""Static, dynamic and continuous batching on the same requests, measured beside the predicted ratio.

    python benchmarks/batching.py [--model qwen3-0.6b-random|demo] [--requests 64] [--seqs 16] [--repeats 3]

Prompts have 64 tokens; output lengths are all equal to the mean, uniform up to twice the mean, or exponential. All
requests are there from the beginning, so that throughput is what differs. The prediction runs the same scheduler on a
virtual clock with a step costing ``a + b * tokens`` seconds; a and b are fitted beforehand from steps with 1 and with
all rows.
"""

from __future__ import annotations

import argparse
import random
import time

from common import model_folder, save, spread, token_ids

from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.executor import LocalExecutor
from tokenmill.engine.plan import StepPlan, StepResult
from tokenmill.testing import FakeClock, FakeExecutor
from tokenmill.types import EngineRequest, SamplingParams

MODES = ("static", "dynamic", "continuous")
PROMPT = 64


class CostedExecutor(FakeExecutor):
    """Computes nothing; each step costs ``a + b * tokens`` seconds of a virtual clock."""

    def __init__(self, facts, clock: FakeClock, a: float, b: float) -> None:
        super().__init__(facts, clock=clock, seconds_per_token=b)
        self._a = a

    def execute(self, plan: StepPlan) -> StepResult:
        self._clock.advance(self._a)
        return super().execute(plan)


def lengths(kind: str, count: int, mean: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    if kind == "equal":
        return [mean] * count
    if kind == "uniform":
        return [rng.randint(1, 2 * mean - 1) for _ in range(count)]
    return [max(1, min(6 * mean, round(rng.expovariate(1 / mean)))) for _ in range(count)]


def requests(outputs: list[int], seed: int) -> list[EngineRequest]:
    return [
        EngineRequest(
            request_id=str(index), prompt_token_ids=token_ids(seed * 1000 + index, PROMPT), arrival=0.0,
            params=SamplingParams(temperature=0, max_tokens=count, ignore_eos=True),
        )
        for index, count in enumerate(outputs)
    ]  # fmt: skip


def config(model: str, mode: str, seqs: int) -> EngineConfig:
    return build(
        EngineConfig,
        {
            "model": {"model": model, "max_model_len": 1024},
            "cache": {"prefix_caching": False},
            "scheduler": {"batching": mode, "max_num_seqs": seqs, "max_num_batched_tokens": PROMPT * seqs},
        },
    )


def serve(engine: Engine, work: list[EngineRequest], clock) -> float:
    began = clock()
    for request in work:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return clock() - began


def fit(model: str, executor: LocalExecutor, seqs: int) -> tuple[float, float]:
    """Seconds per step and per token, from decode steps with one row and with all rows."""
    seconds = {}
    for rows in (1, seqs):
        engine = Engine(config(model, "continuous", seqs), executor)
        for request in requests([24] * rows, seed=9):
            engine.add(request)
        engine.step()
        began = time.monotonic()
        for _ in range(20):
            engine.step()
        seconds[rows] = (time.monotonic() - began) / 20
    b = (seconds[seqs] - seconds[1]) / (seqs - 1)
    return seconds[1] - b, b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b-random")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seqs", type=int, default=16)
    parser.add_argument("--mean", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = "demo" if args.model == "demo" else str(model_folder(args.model))
    executor = LocalExecutor(config(model, "continuous", args.seqs))
    serve(Engine(config(model, "continuous", args.seqs), executor), requests([4] * 4, seed=8), time.monotonic)
    result = {}
    for kind in ("equal", "uniform", "exponential"):
        rates: dict[str, list[float]] = {mode: [] for mode in MODES}
        predicted: dict[str, list[float]] = {mode: [] for mode in MODES}
        padded: dict[str, list[int]] = {mode: [] for mode in MODES}
        for repeat in range(args.repeats):
            a, b = fit(model, executor, args.seqs)
            outputs = lengths(kind, args.requests, args.mean, repeat)
            for mode in MODES:
                engine = Engine(config(model, mode, args.seqs), executor)
                rates[mode].append(sum(outputs) / serve(engine, requests(outputs, repeat), time.monotonic))
                padded[mode].append(engine.stats().padded_tokens)
                clock = FakeClock()
                virtual = Engine(config(model, mode, args.seqs), CostedExecutor(executor.facts, clock, a, b), clock)
                predicted[mode].append(sum(outputs) / serve(virtual, requests(outputs, repeat), clock))
        result[kind] = {
            "output tokens/s": {mode: spread(values) for mode, values in rates.items()},
            "padded tokens": {mode: spread(values) for mode, values in padded.items()},
            "continuous/static measured": spread(
                [c / s for c, s in zip(rates["continuous"], rates["static"], strict=True)]
            ),
            "continuous/static predicted": spread(
                [c / s for c, s in zip(predicted["continuous"], predicted["static"], strict=True)]
            ),
        }
    save(f"batching_{'demo' if args.model == 'demo' else '0.6b'}", {"settings": vars(args), **result})


if __name__ == "__main__":
    main()
