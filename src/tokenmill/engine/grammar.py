"""Structured output: which tokens a grammar allows next. The mechanism; the choices are in `grammars`.

A grammar is compiled on a thread of its own while its request waits, and the masks of a step are computed by other
threads while the model runs. Where a request stands in its grammar follows from the tokens it has generated, so nothing
is lost when it is preempted, and a plan need not speak of it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.device import machine
from tokenmill.engine.config import GRAMMARS, EngineConfig
from tokenmill.engine.memory import ModelFacts
from tokenmill.engine.plan import RowResult, SampleRow
from tokenmill.errors import EngineError, RequestError, TokenmillError
from tokenmill.models.folder import read_generation, read_spec, resolve
from tokenmill.types import ErrorInfo, FinishReason, StructuredOutput

__all__ = ["Backend", "Grammars", "Mask", "Masks", "Matcher", "refused"]

_MAX_BYTES = 128 * 1024
"""Longest schema or grammar. A hostile one of this size takes a second of the compiling thread."""
_STACK_BYTES = 256 * 2**20
"""Of the compiling thread: compilers recurse, and a chain of definitions within `_MAX_BYTES` must not end the process.
Only what is touched takes memory."""
_KEPT = 128
"""Compiled grammars to keep."""


class Matcher(Protocol):
    """A place in a grammar. Not for two threads at once."""

    def copy(self) -> Matcher:
        """Another one at the same place."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Goes on by these tokens.

        Raises:
            EngineError: ``grammar_failed`` when they are not allowed, or the grammar takes more work than its limits.
        """

    def allowed(self) -> NDArray[np.uint8]:
        """One bit per token of the vocabulary, lowest first, set where it may come next. End-of-text tokens may where
        the text is complete.

        Raises:
            EngineError: ``grammar_failed`` as above.
        """

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""


class Backend(Protocol):
    """Compiles grammars for one vocabulary.

    Args:
        path: folder of the model, with its ``tokenizer.json``.
        vocab_size: tokens of the logits, of which the tokenizer may know fewer.
        eos_ids: end-of-text tokens.
    """

    def __init__(self, path: Path, vocab_size: int, eos_ids: Sequence[int]) -> None: ...

    @staticmethod
    def require() -> None:
        """Raises MissingDependencyError when it is not installed."""

    def compile(self, structured: StructuredOutput) -> Matcher:
        """The beginning of a grammar.

        Raises:
            RequestError: see `refused`.
        """


def refused(structured: StructuredOutput, reason: str) -> RequestError:
    """The error for a grammar that cannot be served: ``unsupported_schema`` or ``invalid_grammar``."""
    code = "unsupported_schema" if structured.json_schema is not None else "invalid_grammar"
    # A line may repeat the whole of what was sent.
    lines = [line if len(line) <= 160 else f"{line[:80]} ... {line[-80:]}" for line in reason.splitlines()[:12]]
    reason = "\n".join(lines).strip().rstrip(".")
    return RequestError(
        code, f"{structured.kind} cannot be followed. {reason[:1].upper()}{reason[1:]}.", structured.kind
    )


class Grammars:
    """The grammars of one model, compiled on a thread of its own. Owned by one thread.

    Raises:
        MissingDependencyError: the grammar engine of `config` is not installed.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._kind = cast(type[Backend], GRAMMARS.get(config.grammar_backend))
        self._kind.require()
        self._backend: Backend | None = None
        self._thread = ThreadPoolExecutor(1, "tokenmill-grammar")
        self._known: OrderedDict[bytes, Future[Matcher]] = OrderedDict()

    def compile(self, structured: StructuredOutput) -> Future[Matcher]:
        """The beginning of a grammar, to be copied; or RequestError ``unsupported_schema`` or ``invalid_grammar``."""
        key = msgspec.msgpack.encode(structured)
        future = self._known.pop(key, None)
        if future is None or (future.done() and future.exception() is not None):
            if len(key) > _MAX_BYTES:
                future = Future()
                future.set_exception(refused(structured, f"it has more than {_MAX_BYTES} bytes"))
                return future
            if not self._known:
                self._start_thread()
            future = self._thread.submit(self._compile, structured)
        self._known[key] = future
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return future

    def _start_thread(self) -> None:
        before = threading.stack_size(_STACK_BYTES)
        try:
            self._thread.submit(int)  # a pool starts its thread with the first task
        finally:
            threading.stack_size(before)

    def _compile(self, structured: StructuredOutput) -> Matcher:
        if self._backend is None:
            path = resolve(self._config.model.model)
            self._backend = self._kind(path, read_spec(path).vocab_size, read_generation(path).eos_ids)
        try:
            matcher = self._backend.compile(structured)
            matcher.copy().allowed()  # some grammars show only now that they allow nothing, or take too much work
        except EngineError as error:
            raise refused(structured, error.message) from None
        return matcher


@dataclasses.dataclass(frozen=True, slots=True)
class Mask:
    """What a grammar says about the next token of one request."""

    token_ids: NDArray[np.int64]
    """The allowed tokens or the forbidden ones, whichever are fewer."""
    allow: bool
    """Whether they are the allowed ones."""
    complete: bool = False
    """Whether the text may end here."""
    error: ErrorInfo | None = None

    @property
    def dead(self) -> bool:
        """Whether nothing is allowed."""
        return self.allow and not len(self.token_ids)

    def ending(self) -> RowResult:
        """How the request ends if no token is left: well, if its text is complete."""
        if self.complete:
            return RowResult(ended=FinishReason.STOP)
        stuck = ErrorInfo(
            "grammar_dead_end",
            "The grammar, allowed_token_ids, bad_words and the end-of-text rules together leave no token.",
            "structured",
        )
        return RowResult(ended=FinishReason.ERROR, error=self.error or stuck)


class Masks:
    """Follows requests through their grammars, on threads beside the one that runs the model.

    What it holds are the matchers of the rows of the latest plan, by request. One that is not in it has ended, or
    waits, and what it needs again is a function of its tokens.
    """

    def __init__(self, grammars: Grammars, facts: ModelFacts) -> None:
        self._grammars = grammars
        self._vocab_size = facts.vocab_size
        self._eos_ids = list(facts.eos_ids)
        self._width = max(1, machine().cores // 4)
        self._threads = ThreadPoolExecutor(self._width, "tokenmill-mask")
        self._followers: dict[str, _Follower] = {}

    def begin(self, rows: Sequence[SampleRow]) -> list[Future[dict[str, Mask]]]:
        """Starts computing the masks of `rows`, which all have a grammar: each thread those of some, by request."""
        followers: dict[str, _Follower] = {}
        for row in rows:
            structured = cast(StructuredOutput, row.params.structured)
            follower = self._followers.get(row.request_id)
            if follower is None or follower.structured != structured or follower.taken > row.generated:
                follower = _Follower(structured, self._grammars.compile(structured))
            followers[row.request_id] = follower
        self._followers = followers
        shares = [rows[start :: self._width] for start in range(min(self._width, len(rows)))]
        return [self._threads.submit(self._masks, followers, share) for share in shares]

    def _masks(self, followers: Mapping[str, _Follower], rows: Sequence[SampleRow]) -> dict[str, Mask]:
        return {row.request_id: self._mask(followers[row.request_id], row) for row in rows}

    def _mask(self, follower: _Follower, row: SampleRow) -> Mask:
        try:
            bits, complete = follower.at(row)
        except TokenmillError as error:
            info = ErrorInfo(error.code, error.message, error.field)
            return Mask(np.empty(0, np.int64), allow=True, error=info)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if row.params.ignore_eos:
            allowed[self._eos_ids] = False
        few = int(np.count_nonzero(allowed)) <= self._vocab_size // 2
        return Mask(np.flatnonzero(allowed if few else ~allowed), few, complete)


class _Follower:
    """One request's place in its grammar."""

    def __init__(self, structured: StructuredOutput, start: Future[Matcher]) -> None:
        self.structured = structured
        self.taken = 0
        """Generated tokens that the matcher has gone through."""
        self._start = start
        self._matcher: Matcher | None = None

    def at(self, row: SampleRow) -> tuple[NDArray[np.uint8], bool]:
        """The tokens allowed after all of a row's, and whether it may end there."""
        if self._matcher is None:
            self._matcher = self._start.result().copy()
        new = row.history[row.prompt_len + self.taken : row.prompt_len + row.generated]
        self.taken = row.generated
        self._matcher.accept(new)
        return self._matcher.allowed(), self._matcher.complete
