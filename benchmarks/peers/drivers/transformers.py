"""transformers: `generate`, many requests as one batch padded on the left and run to the longest output."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from importlib.metadata import version

import torch
from drivers import protocol
from transformers import AutoModelForCausalLM


class FirstToken:
    """A streamer that notes when the first new token came; the prompt is put first."""

    def __init__(self) -> None:
        self._count = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._count += 1
        if self._count == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


class Transformers:
    def __init__(self, settings: protocol.Settings) -> None:
        torch.set_num_threads(settings.threads)
        self._model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16).eval()
        self.versions = {name: version(name) for name in ("transformers", "torch")}

    def prepare(self, shape: protocol.Shape) -> None:
        pass

    @torch.inference_mode()
    def serve(self, requests: list[protocol.Request]) -> protocol.Served:
        began = time.perf_counter()
        longest = max(len(ids) for ids, _ in requests)
        most = max(tokens for _, tokens in requests)
        rows = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(rows)
        for row, (ids, _) in enumerate(requests):
            rows[row, longest - len(ids) :] = torch.tensor(ids)
            mask[row, longest - len(ids) :] = 1
        # A streamer takes one row only: of a batch the first tokens are not known apart from the last ones.
        streamer = FirstToken() if len(requests) == 1 else None
        out = self._model.generate(
            rows, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, streamer=streamer,
            pad_token_id=0,
        )  # fmt: skip
        ended = time.perf_counter()
        first = (streamer.at if streamer else ended) - began
        generated = out.shape[1] - longest
        return protocol.Served(
            ended - began, [first] * len(requests), [min(generated, tokens) for _, tokens in requests]
        )


@contextlib.contextmanager
def load(settings: protocol.Settings) -> Iterator[Transformers]:
    yield Transformers(settings)


if __name__ == "__main__":
    protocol.main(load)
