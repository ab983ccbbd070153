"""Requests as clients send them: OpenAI's parameters and vLLM's extra ones, checked and turned into our own types.

Source: https://platform.openai.com/docs/api-reference/chat/create, .../completions/create
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from tokenmill.errors import RequestError, did_you_mean
from tokenmill.types import SamplingParams

__all__ = ["ChatRequest", "CompletionRequest", "StreamOptions", "parse"]

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""An integer that crosses to the engine in 64 bits."""

_OWN_SAMPLING = frozenset({"max_tokens", "logprobs", "prompt_logprobs"})
"""Sampling parameters that each endpoint reads in its own way."""

_SAMPLING = frozenset(SamplingParams.__struct_fields__) - _OWN_SAMPLING

_RESERVED_VARIABLES = frozenset({"tokenizer", "messages", "tools", "documents", "add_generation_prompt"})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Strict):
    """``stream_options``."""

    include_usage: bool = False
    """Send the usage in a last chunk without choices."""
    continuous_usage_stats: bool = False
    """Send the usage so far with every chunk (vLLM)."""
    include_obfuscation: Any = None


class _Request(_Strict):
    """What both endpoints share. None means "as if it were not there"."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Int, float] | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    max_tokens: Int | None = None

    # vLLM's own
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[Int] | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    prompt_logprobs: Int | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str = ""
    priority: Int = 0

    user: str | None = None
    """Who is served: the tenant between whom `fair_share` and `round_robin` share."""

    # OpenAI's parameters for its own platform; they change nothing here.
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    def _sampling(self, **own: Any) -> SamplingParams:
        given = {name: value for name in _SAMPLING if (value := getattr(self, name, None)) is not None}
        return SamplingParams(**given, **own)

    def _refuse(self, *fields: str) -> None:
        for field in fields:
            if getattr(self, field) is not None:
                raise _unsupported(field, f"{field} is not supported.")

    def check(self) -> None:
        """Refuses what is well-formed but cannot be done.

        Raises:
            RequestError: ``unsupported_parameter`` or ``invalid_parameter``.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("invalid_parameter", "stream_options needs stream: true.", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise _unsupported("prompt_logprobs", "prompt_logprobs is not sent in a stream; leave stream out.")

    @property
    def usage_options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


class Message(_Strict):
    """One message; what else it holds goes to the chat template as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: Any = None


class Tool(_Strict):
    """One tool; shown to the model as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    function: dict[str, Any]


class ChatRequest(_Request):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None

    # vLLM's own
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    # Without effect here: hints to OpenAI's models and platform.
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None

    # Not supported: asked for, they are refused.
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None
    web_search_options: Any = None

    def check(self) -> None:
        super().check()
        self._refuse("functions", "function_call", "audio", "web_search_options")
        if self.modalities not in (None, ["text"]):
            raise _unsupported("modalities", "The only modality is text.")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise _unsupported("response_format", "The only response_format is text.")
        if self.tool_choice not in (None, "auto", "none"):
            raise _unsupported("tool_choice", "tool_choice can be 'auto' or 'none'.")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("invalid_parameter", "top_logprobs needs logprobs: true.", "top_logprobs")
        if reserved := _RESERVED_VARIABLES & self.chat_template_kwargs.keys():
            raise RequestError(
                "invalid_parameter", f"chat_template_kwargs cannot set {min(reserved)}.", "chat_template_kwargs"
            )

    def sampling_params(self) -> SamplingParams:
        """How to sample. Without a limit of its own, an answer may fill the context."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(max_tokens=limit, logprobs=logprobs, prompt_logprobs=self.prompt_logprobs)

    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools as the template gets them."""
        if self.tools is None or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]


class CompletionRequest(_Request):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str] | list[Int] | list[list[Int]]
    echo: bool = False
    logprobs: Int | None = None

    # Not supported: asked for, they are refused.
    suffix: Any = None
    best_of: Int | None = None

    def check(self) -> None:
        super().check()
        self._refuse("suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _unsupported("best_of", "best_of is not supported; ask for n completions and choose.")
        if self.prompt == []:
            raise RequestError("empty_prompt", "There is no prompt; send at least one.", "prompt")

    @property
    def only_echo(self) -> bool:
        """Whether nothing is to be generated: the prompt comes back, for its log probabilities."""
        return self.echo and self.max_tokens == 0

    def sampling_params(self) -> SamplingParams:
        """How to sample. Without a limit of its own, a completion has 16 tokens, as OpenAI's."""
        if self.only_echo:
            limit = 1
        else:
            limit = 16 if self.max_tokens is None else self.max_tokens
        of_prompt = self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs
        return self._sampling(max_tokens=limit, logprobs=self.logprobs, prompt_logprobs=of_prompt)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if one else self.prompt)


R = TypeVar("R", bound=_Request)


def parse(model: type[R], body: bytes) -> R:
    """A checked request.

    Raises:
        RequestError: ``invalid_json``, ``unknown_parameter``, ``missing_parameter``, ``invalid_parameter``,
            ``unsupported_parameter``; about the first fault, with its field.
    """
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False)[0], model) from None
    request.check()
    return request


def _request_error(fault: ErrorDetails, model: type[_Request]) -> RequestError:
    kind, reason = fault["type"], fault["msg"]
    field = _field(fault["loc"])
    if kind == "json_invalid":
        return RequestError("invalid_json", f"The body cannot be read: {reason}.")
    if not field:
        return RequestError("invalid_json", "The body must be a JSON object.")
    if kind == "extra_forbidden":
        hint = did_you_mean(field, model.model_fields) if len(fault["loc"]) == 1 else ""
        return RequestError("unknown_parameter", f"There is no parameter {field!r}. {hint}".rstrip(), field)
    if kind == "missing":
        return RequestError("missing_parameter", f"{field} is missing.", field)
    return RequestError("invalid_parameter", f"{field}: {reason}.", field)


def _field(location: tuple[int | str, ...]) -> str:
    """``messages[0].role`` from pydantic's location, of which alternatives of a union (``list[str]``) are no part."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            path += f".{part}" if path else part
        elif not path:
            path = part
        else:
            break
    return path


def _unsupported(field: str, message: str) -> RequestError:
    return RequestError("unsupported_parameter", message, field)
