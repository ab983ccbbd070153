"""The sampling parameters that are worth a flag. The others are for programs, which have `SamplingParams`."""

from __future__ import annotations

import dataclasses

from tokenmill.config import option
from tokenmill.types import SamplingParams

__all__ = ["Sampling"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a command that generates text chooses its tokens. Ranges are checked by `SamplingParams`."""

    max_tokens: int | None = option(None, "longest answer in tokens; by default as long as the context allows")
    temperature: float = option(0.0, "0 takes the most likely token each time")
    top_p: float = option(1.0, "keep the smallest set of most likely tokens that reaches this probability")
    top_k: int = option(0, "keep this many most likely tokens; 0 keeps all")
    min_p: float = option(0.0, "drop tokens less likely than this times the most likely one")
    repetition_penalty: float = option(1.0, "above 1 discourages tokens that were seen before")
    seed: int | None = option(None, "makes the answer reproducible")
    stop: tuple[str, ...] = option((), "text that ends the answer; may be given several times")

    def params(self) -> SamplingParams:
        """The same as sampling parameters.

        Raises:
            RequestError: ``invalid_parameter`` when a value is out of range.
        """
        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return SamplingParams(**(chosen | {"stop": list(self.stop)}))
