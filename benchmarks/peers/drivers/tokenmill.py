"""tokenmill in process, through `tokenmill.llm.LLM`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from importlib.metadata import version

from drivers import protocol

from tokenmill import __version__
from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.llm import LLM
from tokenmill.types import SamplingParams


class Tokenmill:
    def __init__(self, settings: protocol.Settings) -> None:
        options = {
            "model": {
                "model": settings.model,
                "quantize": "none" if settings.precision == "bf16" else settings.precision,
                # The rivals' int4 has 4 bits in embedding and head too; tokenmill's own choice would be 8.
                "quantize_head": "int4" if settings.precision == "int4" else "auto",
                "max_model_len": settings.max_len,
                "threads": settings.threads,
            },
            "cache": {"memory_gib": settings.kv_gib},
            "scheduler": {"max_num_seqs": settings.max_requests, "max_num_batched_tokens": 2048},
        }
        self._llm = LLM(config=build(EngineConfig, options))
        self.versions = {"tokenmill": __version__, "torch": version("torch")}

    def prepare(self, shape: protocol.Shape) -> None:
        pass

    def serve(self, requests: list[protocol.Request]) -> protocol.Served:
        began = time.monotonic()
        outputs = self._llm.generate(
            [ids for ids, _ in requests],
            [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for _, tokens in requests],
        )
        seconds = time.monotonic() - began
        first = [(output.stats[0].first_token or 0.0) - began for output in outputs]
        return protocol.Served(seconds, first, [len(output.outputs[0].token_ids) for output in outputs])


@contextlib.contextmanager
def load(settings: protocol.Settings) -> Iterator[Tokenmill]:
    yield Tokenmill(settings)


if __name__ == "__main__":
    protocol.main(load)
