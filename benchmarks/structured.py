"""Structured output at a high temperature: how much of it is valid, what its masks take, and what they cost the step.

    python benchmarks/structured.py [--model demo|qwen3-0.6b-random] [--requests 1000] [--temperature 1.5] [--json]

The requests take the 20 schemas of schemas.json in turn; each answer may be as long as the model's context. It is valid
when it parses and jsonschema finds nothing wrong with it; one that was cut by the context counts as cut, not as valid.
For the cost to the step, batches of the same prompts run in turns without and with a grammar, here a long string and a
nested array, and every answer has the same length, so that only the masks differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from typing import Any

import jsonschema
from common import ROOT, model_folder, save, spread

from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.grammar import Grammars, Mask, Masks
from tokenmill.engine.plan import SampleRow
from tokenmill.llm import LLM
from tokenmill.types import FinishReason, SamplingParams, StructuredOutput

SCHEMAS: dict[str, Any] = json.loads((ROOT / "schemas.json").read_text())
LENGTH = 128
"""Tokens of each answer in the comparison of steps."""
STEADY = {
    "string": StructuredOutput(regex=r'"[^"]{2000}"'),
    "nested array": StructuredOutput(
        json_schema=json.dumps(
            {"type": "array", "minItems": 500, "items": {"type": "array", "minItems": 3, "items": {"type": "integer"}}}
        )
    ),
}
"""Grammars that an answer of `LENGTH` tokens does not come to the end of."""


class ClockedMasks(Masks):
    """Keeps how long each mask took on its thread."""

    seconds: list[float]

    def _mask(self, follower: Any, row: SampleRow) -> Mask:
        began = time.perf_counter()
        mask = super()._mask(follower, row)
        self.seconds.append(time.perf_counter() - began)
        return mask


def times(values: list[float], unit: float) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] * unit  # noqa: E731
    return {
        "mean": statistics.fmean(ordered) * unit,
        "p50": at(0.5),
        "p99": at(0.99),
        "max": at(1.0),
        "n": len(ordered),
    }


def clock_masks(llm: LLM) -> ClockedMasks:
    runner = llm.engine._executor._runner  # type: ignore[attr-defined]
    runner._masks = masks = ClockedMasks(llm._grammars, llm.engine.facts)
    masks.seconds = []
    return masks


def compile_times(config: EngineConfig) -> dict[str, float]:
    """Each schema alone, first mask included, once the backend is loaded."""
    grammars = Grammars(config)
    grammars.compile(StructuredOutput(regex="a")).result()
    found = []
    for schema in SCHEMAS.values():
        began = time.perf_counter()
        grammars.compile(StructuredOutput(json_schema=json.dumps(schema))).result()
        found.append(time.perf_counter() - began)
    return times(found, 1e3)


def verdict(output: Any, schema: Any) -> str:
    completion = output.outputs[0]
    if completion.finish_reason is not FinishReason.STOP:
        return "cut" if completion.finish_reason is FinishReason.LENGTH else str(completion.error.code)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    try:
        document = json.loads(completion.text)
    except ValueError:
        return "not JSON"
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    return "valid" if validator.is_valid(document) else "against the schema"


def answers(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    masks = clock_masks(llm)
    names = [list(SCHEMAS)[number % len(SCHEMAS)] for number in range(args.requests)]
    prompts = [f"<{number}> Answer with JSON: {name}.\n" for number, name in enumerate(names)]
    params = [
        SamplingParams(
            structured=StructuredOutput(json_schema=json.dumps(SCHEMAS[name])), temperature=args.temperature,
            max_tokens=None, seed=args.seed + number,
        )
        for number, name in enumerate(names)
    ]  # fmt: skip
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    verdicts = [verdict(output, SCHEMAS[name]) for output, name in zip(outputs, names, strict=True)]
    tokens = [len(output.outputs[0].token_ids) for output in outputs]
    wrong = [
        {"schema": name, "verdict": each, "text": output.outputs[0].text[:200]}
        for name, each, output in zip(names, verdicts, outputs, strict=True)
        if each != "valid"
    ]
    return {
        "requests": len(outputs),
        "verdicts": dict(Counter(verdicts)),
        "valid share": verdicts.count("valid") / len(verdicts),
        "different texts": len({output.outputs[0].text for output in outputs}),
        "tokens": {"mean": statistics.fmean(tokens), "max": max(tokens), "sum": sum(tokens)},
        "seconds": seconds,
        "mask microseconds per token": times(masks.seconds, 1e6),
        "not valid": wrong[:10],
    }


def cost(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Output tokens per second of the same batch with and without grammars, in turns."""
    kinds: dict[str, StructuredOutput | None] = {"none": None, **STEADY}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    processor: dict[str, list[float]] = {kind: [] for kind in kinds}
    masks: dict[str, list[float]] = {kind: [] for kind in STEADY}
    prompts = [f"<{number}> " + "a short prompt " * 4 for number in range(args.rows)]
    for turn in range(args.turns + 1):
        for kind, structured in kinds.items():
            clocked = clock_masks(llm)
            params = SamplingParams(
                structured=structured, temperature=args.temperature, seed=turn, max_tokens=LENGTH, ignore_eos=True
            )
            began, worked = time.perf_counter(), time.process_time()
            outputs = llm.generate(prompts, params)
            seconds, work = time.perf_counter() - began, time.process_time() - worked
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            assert tokens == LENGTH * args.rows
            if turn:  # the first only warms up
                rates[kind].append(tokens / seconds)
                processor[kind].append(work / tokens * 1e6)
                if structured is not None:
                    masks[kind] += clocked.seconds
    return {
        "rows": args.rows,
        "output tokens per second": {kind: spread(values) for kind, values in rates.items()},
        "of the rate without": {
            kind: spread([with_ / without for with_, without in zip(rates[kind], rates["none"], strict=True)])
            for kind in STEADY
        },
        "processor microseconds per token": {kind: spread(values) for kind, values in processor.items()},
        "mask microseconds per token": {kind: times(values, 1e6) for kind, values in masks.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/structured_MODEL.json too")
    args = parser.parse_args()
    model = "demo" if args.model == "demo" else str(model_folder(args.model))
    config = build(EngineConfig, {"model": {"model": model}, "cache": {"memory_gib": 1.0}})
    compiling = compile_times(config)
    llm = LLM(config=config)
    result = {
        "compile milliseconds": compiling,
        "answers": answers(llm, args),
        "cost to the step": cost(llm, args),
    }
    if args.json:
        save(f"structured_{'demo' if args.model == 'demo' else '0.6b'}", {"settings": vars(args), **result})
    else:
        print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
