"""OpenVINO GenAI: its ContinuousBatchingPipeline, stepped here."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import openvino
import openvino_genai as genai
from drivers import protocol


class OpenVino:
    def __init__(self, settings: protocol.Settings) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = settings.kv_gib
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        scheduler.max_num_seqs = settings.max_requests
        scheduler.max_num_batched_tokens = 512
        properties = {
            "INFERENCE_NUM_THREADS": settings.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": True,
        }
        self._pipeline = genai.ContinuousBatchingPipeline(settings.model, scheduler, "CPU", properties)
        self._numbers = itertools.count()
        self.versions = {name: version(name) for name in ("openvino", "openvino-genai")}

    def prepare(self, shape: protocol.Shape) -> None:
        pass

    def serve(self, requests: list[protocol.Request]) -> protocol.Served:
        first = [0.0] * len(requests)
        tokens = [0] * len(requests)
        began = time.perf_counter()
        handles = []
        for ids, count in requests:
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = count
            config.ignore_eos, config.do_sample = True, False
            prompt = openvino.Tensor(np.array([ids], dtype=np.int64))
            handles.append(self._pipeline.add_request(next(self._numbers), prompt, config))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            at = time.perf_counter() - began
            for row, handle in enumerate(handles):
                while handle.can_read():
                    new = sum(len(output.generated_ids) for output in handle.read().values())
                    if new and not tokens[row]:
                        first[row] = at
                    tokens[row] += new
        return protocol.Served(time.perf_counter() - began, first, tokens)


@contextlib.contextmanager
def load(settings: protocol.Settings) -> Iterator[OpenVino]:
    yield OpenVino(settings)


if __name__ == "__main__":
    protocol.main(load)
