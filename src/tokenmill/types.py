"""The values that every floor shares. No torch, no text, no HTTP.

They are msgspec structs because the same values cross the boundary between the HTTP process and the engine process.
Times are seconds on the machine's monotonic clock unless a name says otherwise.
"""

from __future__ import annotations

import enum
import math
from array import array
from collections.abc import Callable
from typing import Any

import msgspec

from tokenmill.errors import RequestError

__all__ = [
    "Clock",
    "CompletionOutput",
    "EngineOutput",
    "EngineRequest",
    "EngineStats",
    "ErrorInfo",
    "FinishReason",
    "PoolingParams",
    "RequestOutput",
    "RequestStats",
    "SamplingParams",
    "StructuredOutput",
    "TokenLogprobs",
]

Clock = Callable[[], float]
"""Returns seconds that never go backwards."""


class FinishReason(enum.StrEnum):
    """Why a request ended. Each request gets exactly one."""

    STOP = "stop"
    """A stop token, a stop string, or the end-of-text token."""
    LENGTH = "length"
    """`max_tokens` or the longest context was reached."""
    ABORT = "abort"
    """The caller gave it up or disconnected."""
    ERROR = "error"
    """The engine failed; `ErrorInfo` says how."""


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the text of an answer must be. Exactly one field is given; the names are vLLM's, apart from `json_schema`.

    Raises:
        RequestError: ``invalid_parameter`` unless exactly one is given, and it is not empty.
    """

    json_schema: str | None = None
    """JSON that a schema allows; the schema as JSON text."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """A text that the whole of this expression matches."""
    choice: list[str] | None = None
    """One of these texts."""
    grammar: str | None = None
    """A text of this grammar, in Lark's syntax or in GBNF (rules written with ``::=``)."""

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                "invalid_parameter",
                f"Structured output needs exactly one of {', '.join(self.__struct_fields__)}; got "
                f"{' and '.join(given) or 'none'}.",
                given[-1] if given else "structured",
            )
        value = getattr(self, self.kind)
        for text in value if isinstance(value, list) else [value]:
            if text is not True and (not isinstance(text, str) or not text or not _is_unicode(text)):
                raise RequestError("invalid_parameter", f"{self.kind} must be non-empty valid Unicode.", self.kind)
        if not value:
            raise RequestError("invalid_parameter", "choice must name at least one text.", "choice")

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in self.__struct_fields__ if getattr(self, name) not in (None, False))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose the next tokens of one request. Names and defaults are vLLM's.

    Raises:
        RequestError: ``invalid_parameter``, naming the field, when a value is out of range.
    """

    n: int = 1
    """Number of completions."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this."""
    min_p: float = 0.0
    """Drop tokens less likely than this times the most likely one."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence of each token already generated."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (CTRL, arXiv 1909.05858)."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids."""
    allowed_token_ids: list[int] | None = None
    """Only these tokens may be chosen."""
    bad_words: list[str] = []
    """Texts that must not appear; turned into `bad_words_ids` before the request reaches the engine."""
    bad_words_ids: list[list[int]] = []
    """Token sequences whose last token is forbidden once the rest stands before it."""
    seed: int | None = None
    """Makes the result reproducible, whatever else is in the batch."""
    stop: list[str] | str | None = None
    """Texts that end the completion; they are cut off. Always a list after construction."""
    stop_token_ids: list[int] = []
    """Tokens that end the completion."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    max_tokens: int | None = 16
    """Longest completion in tokens; None means as much as the context holds."""
    min_tokens: int = 0
    """No end-of-text or stop token before this many tokens."""
    logprobs: int | None = None
    """Return log probabilities of the chosen token and of this many most likely ones."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None
    """What the text must be: only tokens that can lead there may be chosen."""

    def __post_init__(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        msgspec.structs.force_setattr(self, "stop", stop)
        finite = math.isfinite
        checks: tuple[tuple[str, bool, str], ...] = (
            ("n", 1 <= self.n <= 128, "between 1 and 128"),
            ("temperature", finite(self.temperature) and 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= -1, "a positive number, or 0 or -1 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            (
                "repetition_penalty",
                finite(self.repetition_penalty) and self.repetition_penalty > 0,
                "a positive number",
            ),
            ("logit_bias", all(finite(v) for v in (self.logit_bias or {}).values()), "made of finite numbers"),
            ("allowed_token_ids", self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "not empty"),
            ("bad_words", all(self.bad_words), "made of non-empty texts"),
            ("bad_words_ids", all(self.bad_words_ids), "made of non-empty sequences"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            ("stop", all(stop), "made of non-empty texts"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            (
                "min_tokens",
                self.min_tokens >= 0 and (self.max_tokens is None or self.min_tokens <= self.max_tokens),
                "between 0 and max_tokens",
            ),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 64, "between 0 and 64"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 64,
                "between 0 and 64",
            ),
        )
        for field, ok, rule in checks:
            if not ok:
                raise RequestError("invalid_parameter", f"{field} must be {rule}; got {getattr(self, field)!r}.", field)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to make one embedding of the hidden states of a prompt, those behind the last norm.

    Raises:
        RequestError: ``invalid_parameter``, naming the field, when a value is out of range.
    """

    pooling: str = "last"
    """``last`` takes the state of the last token, ``mean`` the mean over all tokens."""
    normalize: bool = True
    """Scale to length 1."""
    dimensions: int | None = None
    """Keep the first so many entries, before normalizing, for models trained so (arXiv 2205.13147); None keeps all."""

    def __post_init__(self) -> None:
        if self.pooling not in ("last", "mean"):
            raise RequestError(
                "invalid_parameter", f"pooling must be 'last' or 'mean'; got {self.pooling!r}.", "pooling"
            )
        if self.dimensions is not None and self.dimensions < 1:
            raise RequestError(
                "invalid_parameter", f"dimensions must be at least 1; got {self.dimensions}.", "dimensions"
            )


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate, as the engine takes it: token ids only, `params.n` already spread over requests."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival: float
    """When the caller asked, on the monotonic clock."""
    priority: int = 0
    """Higher goes first under the `priority` policy."""
    deadline: float | None = None
    """When the answer should be complete, on the monotonic clock."""
    tenant: str = ""
    """Who is served; the `fair_share` and `round_robin` policies share between tenants."""
    cache_salt: str = ""
    """Requests with different salts never share cached KV."""
    adapter: str = ""
    """Name of the LoRA adapter; part of the cache key."""
    parent: str = ""
    """Request whose prompt is the same: wait for it and share its blocks (completions 2..n of one call)."""
    pooling: PoolingParams | None = None
    """Set for a request that wants the embedding of its prompt and no tokens."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position: entry 0 is the token itself, the rest are the most likely ones in order."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of the token itself, 1 is the most likely."""


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What ended a request whose finish reason is `error`, or kept it from being taken."""

    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None
    """When it is worth asking again; only where the request could not be taken now."""


class RequestStats(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to one request; sent with its last output."""

    arrival: float
    scheduled: float | None
    first_token: float | None
    finished: float
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV was found in the prefix cache on first admission."""
    recomputed_tokens: int
    """Tokens computed again after a preemption."""
    preemptions: int
    misses: dict[str, int]
    """Prompt tokens that had to be computed, by reason; with `cached_tokens` they add up to `prompt_tokens`."""


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step brought to one request."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    """One entry per new token, when asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Sent once, with the first token; entry 0 is None."""
    embedding: bytes = b""
    """Numbers of type float32, for a request that wants an embedding; sent with its end."""
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token that ended the request, unless it was the end-of-text token."""
    error: ErrorInfo | None = None
    stats: RequestStats | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State of the engine after a step; without arguments, of one that is not there yet. Counters only grow."""

    steps: int = 0
    last_progress: float = 0.0
    """When a step last ended, or when work last arrived at an idle engine."""
    running: int = 0
    waiting: int = 0
    waiting_by_reason: dict[str, int] = {}
    blocks_total: int = 0
    blocks_used: int = 0
    """Blocks that requests hold; cached blocks that nobody holds count as free."""
    blocks_cached: int = 0
    """Blocks that nobody holds but whose content can still be reused."""
    block_size: int = 0
    max_model_len: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    """Prompt tokens found there."""
    misses: dict[str, int] = {}
    recomputed_tokens: int = 0
    padded_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = {}
    step_tokens: int = 0
    """Tokens computed by the last step."""
    step_seconds: float = 0.0


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One completion of a request, complete or so far."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it, None for the end-of-text token."""
    error: ErrorInfo | None = None


class RequestOutput(msgspec.Struct, kw_only=True):
    """A request with its completions, as `LLM.generate` returns it and `AsyncLLM.generate` yields it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: array[float] | None = None
    """Of type float32, for a request that wanted one; its only completion is then empty."""
    stats: list[RequestStats] = []
    """One entry per finished completion."""


JSON = dict[str, Any]
"""A JSON object."""
