"""What the commands that talk to a model share: loading it, and streaming one answer while measuring it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from tokenmill.engine.config import EngineConfig
from tokenmill.llm import LLM
from tokenmill.types import Clock, FinishReason, RequestOutput

__all__ = ["Answer", "load", "notes", "stream"]

notes = Console(stderr=True, highlight=False)
"""Where a command tells about its work, so that stdout holds its result alone."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer and how long it took, as its reader saw it."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None
    """None when its reader stopped it."""
    ttft_s: float
    """Seconds from the call to the first token."""
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 for a shorter answer."""
        decode = self.total_s - self.ttft_s
        return (self.completion_tokens - 1) / decode if self.completion_tokens > 1 and decode > 0 else 0.0

    def summary(self) -> str:
        """One line for a person."""
        return (
            f"{self.completion_tokens} tokens, {self.tokens_per_s:.1f} tokens/s, "
            f"first after {self.ttft_s * 1000:.0f} ms, prompt {self.prompt_tokens} tokens ({self.cached_tokens} cached)"
        )


def load(config: EngineConfig) -> LLM:
    """The model, with a progress bar on stderr while its weights are read."""
    columns = (TextColumn("Loading {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True) as bar:
        line = bar.add_task(escape(config.model.model), total=None)
        return LLM(config=config, progress=lambda done, total: bar.update(line, completed=done, total=total))


def stream(outputs: Iterable[RequestOutput], write: Callable[[str], None], clock: Clock = time.perf_counter) -> Answer:
    """Writes each new piece of text as it comes, until the end or Ctrl-C, which ends the answer and is no error."""
    started, first = clock(), None
    text, tokens, reason = "", 0, None
    prompt_tokens = cached_tokens = 0
    iterator = iter(outputs)
    try:
        for output in iterator:
            piece = output.outputs[0]
            if first is None and piece.token_ids:
                first = clock()
            write(piece.text)
            text, tokens, reason = text + piece.text, tokens + len(piece.token_ids), piece.finish_reason
            prompt_tokens, cached_tokens = len(output.prompt_token_ids), max(cached_tokens, output.cached_tokens)
    except KeyboardInterrupt:
        reason = None
    finally:
        # Closing a generator is what tells the engine that nobody reads on.
        if callable(close := getattr(iterator, "close", None)):
            close()
    ended = clock()
    return Answer(text, prompt_tokens, cached_tokens, tokens, reason, (first or ended) - started, ended - started)
