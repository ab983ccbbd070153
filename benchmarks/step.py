"""Where the time of a decode step goes: parts of the layers, head, sampling, and the rest, which is Python and torch.

    python benchmarks/step.py [--rows 32] [--prompt 128] [--steps 30] [--quantize none|int8|int4]

The model has Qwen3-0.6B's shape. The layers read the clock themselves; around head and sampling it is read here.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from common import model_folder, save, token_ids

from tokenmill.config import build
from tokenmill.engine import runner
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.executor import LocalExecutor
from tokenmill.kernels.cpu.packed import PackedWeight
from tokenmill.kernels.cpu.stack_ops import Stack
from tokenmill.types import EngineRequest, SamplingParams

CALLS: tuple[tuple[Any, str, str], ...] = (
    (PackedWeight, "linear_f32", "head"),
    (runner, "sample_rows", "sampling"),
)


def clocked(call: Callable[..., Any], name: str, seconds: Counter[str]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments, **named)
        seconds[name] += time.perf_counter() - began  # type: ignore[assignment]
        return result

    return timed


def clocked_layers(call: Callable[..., Any], seconds: Counter[str]) -> Callable[..., Any]:
    def timed(stack: Stack, *arguments: Any) -> Any:
        before = stack.seconds
        result = call(stack, *arguments)
        seconds.update({name: value - before[name] for name, value in stack.seconds.items()})  # type: ignore[arg-type]
        return result

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
    options = parser.parse_args()
    seconds: Counter[str] = Counter()
    for owner, attribute, name in CALLS:
        setattr(owner, attribute, clocked(getattr(owner, attribute), name, seconds))
    Stack.__call__ = clocked_layers(Stack.__call__, seconds)  # type: ignore[method-assign]
    config = build(
        EngineConfig,
        {
            "model": {"model": str(model_folder()), "max_model_len": 4096, "quantize": options.quantize},
            "cache": {"prefix_caching": False, "memory_gib": 2.0},
            "scheduler": {"max_num_seqs": options.rows, "max_num_batched_tokens": 2048},
        },
    )
    engine = Engine(config, LocalExecutor(config))
    params = SamplingParams(temperature=0, max_tokens=2 * options.steps + 8, ignore_eos=True)
    for row in range(options.rows):
        engine.add(
            EngineRequest(
                request_id=str(row), prompt_token_ids=token_ids(row, options.prompt), arrival=0.0, params=params
            )
        )
    while engine.stats().waiting or not engine.stats().running:
        engine.step()
    for _ in range(options.steps):  # until every row decodes and memory has been touched
        engine.step()
    seconds.clear()
    began = time.perf_counter()
    for _ in range(options.steps):
        engine.step()
    total = time.perf_counter() - began
    rest = total - sum(seconds.values())
    save(
        f"step_{options.quantize}_{options.rows}",
        {
            "milliseconds per step": total / options.steps * 1e3,
            "parts": {name: value / options.steps * 1e3 for name, value in seconds.most_common()},
            "Python and torch": {"milliseconds": rest / options.steps * 1e3, "share": rest / total},
        },
    )


if __name__ == "__main__":
    main()
