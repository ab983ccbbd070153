"""tokenmill beside `transformers` generate, on the same bf16 model, interleaved in one process.

    python benchmarks/against_transformers.py [--repeats 5]

Single stream: 128 tokens in, 128 out. Many: 32 ragged requests at once in tokenmill, one by one in transformers. Both
run greedy without an end-of-text token, on the same token ids and threads. tokenmill computes through its reference
operators.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import model_folder, ragged_requests, save, spread, token_ids
from transformers import AutoModelForCausalLM

from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.llm import LLM
from tokenmill.types import SamplingParams


class Transformers:
    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def one(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds to the first token and to the last."""
        first = _FirstToken()
        ids = torch.tensor([prompt])
        began = time.perf_counter()
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            streamer=first, pad_token_id=0,
        )  # fmt: skip
        ended = time.perf_counter()
        assert out.shape[1] == len(prompt) + tokens
        return first.at - began, ended - began


class _FirstToken:
    """A streamer that notes when the first new token came; the prompt is put first."""

    def __init__(self) -> None:
        self.count = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.count += 1
        if self.count == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


class Tokenmill:
    def __init__(self, folder: str) -> None:
        options = {"model": {"model": folder, "max_model_len": 2048}, "cache": {"prefix_caching": False}}
        self.llm = LLM(config=build(EngineConfig, options))

    def one(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        began = time.perf_counter()
        first = 0.0
        for output in self.llm.stream(prompt, greedy(tokens)):
            first = first or time.perf_counter() - began
            assert output.outputs[0].error is None
        return first, time.perf_counter() - began

    def many(self, requests: list[tuple[list[int], int]]) -> float:
        began = time.perf_counter()
        outputs = self.llm.generate([prompt for prompt, _ in requests], [greedy(tokens) for _, tokens in requests])
        ended = time.perf_counter()
        assert [len(o.outputs[0].token_ids) for o in outputs] == [tokens for _, tokens in requests]
        return ended - began


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    folder = str(model_folder())
    engines = {"tokenmill": Tokenmill(folder), "transformers": Transformers(folder)}
    decode: dict[str, list[float]] = {name: [] for name in engines}
    ttft: dict[str, list[float]] = {name: [] for name in engines}
    many: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.one(token_ids(0, 32), 8)
    for repeat in range(repeats):
        for name, engine in engines.items():
            first, total = engine.one(token_ids(1000 + repeat, 128), 128)
            decode[name].append(127 / (total - first))
            ttft[name].append(first)
    for repeat in range(max(1, repeats // 2)):
        requests = ragged_requests(repeat)
        tokens = sum(count for _, count in requests)
        many["tokenmill"].append(tokens / engines["tokenmill"].many(requests))
        # One by one the rate of every fourth stands for all 32, which would take several minutes.
        some = requests[::4]
        seconds = sum(engines["transformers"].one(*request)[1] for request in some)
        many["transformers"].append(sum(count for _, count in some) / seconds)
    ratios = {
        metric: spread([a / b for a, b in zip(values["tokenmill"], values["transformers"], strict=True)])
        for metric, values in (("decode", decode), ("many", many))
    }
    save(
        "against_transformers",
        {
            "single stream decode, tokens/s": {name: spread(values) for name, values in decode.items()},
            "single stream time to first token, s": {name: spread(values) for name, values in ttft.items()},
            "32 requests, output tokens/s": {name: spread(values) for name, values in many.items()},
            "ratio tokenmill/transformers": ratios,
        },
    )


if __name__ == "__main__":
    main()
