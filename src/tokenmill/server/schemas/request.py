"""What every request body has in common, and how one is read: checked, or refused with the name of the field."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from tokenmill.errors import RequestError, did_you_mean
from tokenmill.types import SamplingParams, StructuredOutput

__all__ = ["Generation", "Int", "Seconds", "StreamOptions", "Strict", "Submission", "Whole", "parse", "unsupported"]

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""An integer that crosses to the engine in 64 bits."""

Seconds = Annotated[float, Field(gt=0, le=86400)]

_OWN_SAMPLING = frozenset({"max_tokens", "logprobs", "prompt_logprobs", "structured"})
"""Sampling parameters that each endpoint reads in its own way."""

_SAMPLING = frozenset(SamplingParams.__struct_fields__) - _OWN_SAMPLING

_GUIDED = ("json", "regex", "choice", "grammar")


class Strict(BaseModel):
    """An object without unknown fields, whose values are of the type they should be."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    def check(self) -> None:
        """Refuses what is well-formed but cannot be done.

        Raises:
            RequestError: ``unsupported_parameter`` or ``invalid_parameter``.
        """


class StreamOptions(Strict):
    """``stream_options``."""

    include_usage: bool = False
    """Send the usage in a last chunk without choices."""
    continuous_usage_stats: bool = False
    """Send the usage so far with every chunk (vLLM)."""
    include_obfuscation: Any = None


class JsonSchema(Strict):
    """A schema with its name."""

    name: str = "answer"
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Without effect: a schema is always followed to the letter."""


class ResponseFormat(Strict):
    """What the answer must be (OpenAI)."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structured(self) -> StructuredOutput | None:
        """As the engine takes it."""
        if self.type == "json_object":
            return StructuredOutput(json_object=True)
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.json_schema is None:
            field = "response_format.json_schema.schema"
            raise RequestError("missing_parameter", f"{field} is missing.", field)
        return StructuredOutput(json_schema=json.dumps(self.json_schema.json_schema, ensure_ascii=False))


class StructuredOutputs(Strict):
    """What the answer must be (vLLM). One of the fields."""

    # `json` is taken in pydantic's base class.
    json_schema: Annotated[str | dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def structured(self) -> StructuredOutput:
        """As the engine takes it."""
        schema = self.json_schema
        return StructuredOutput(
            json_schema=json.dumps(schema, ensure_ascii=False) if isinstance(schema, dict) else schema,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            json_object=bool(self.json_object),
        )


class Submission(Strict):
    """What every request that the engine serves may say about itself."""

    model: str | None = None
    user: str | None = None
    """Who is served: the tenant between whom `fair_share` and `round_robin` share."""
    cache_salt: str = ""
    priority: Int = 0
    timeout_s: Seconds | None = None
    """When the answer is of no more use: the request then ends, wherever it is."""


class Whole(Submission):
    """A request whose answer is always sent at once."""

    @property
    def stream(self) -> None:
        """Never in pieces."""
        return None


class Generation(Submission):
    """OpenAI's parameters for text generation and vLLM's extra ones. None means "as if it were not there"."""

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

    prompt_cache_key: str | None = None
    """Names the conversation, for explanations of the prefix cache."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    """vLLM's older names of ``structured_outputs``."""

    cache_report: bool = False
    """Tell what the prefix cache did for the prompt, and why not more."""

    # OpenAI's parameters for its own platform; they change nothing here.
    metadata: dict[str, Any] | None = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_retention: Any = None

    def sampling(self, **own: Any) -> SamplingParams:
        given = {name: value for name in _SAMPLING if (value := getattr(self, name, None)) is not None}
        return SamplingParams(**given, **own)

    def refuse(self, *fields: str) -> None:
        for field in fields:
            if getattr(self, field) is not None:
                raise unsupported(field, f"{field} is not supported.")

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError("invalid_parameter", "stream_options needs stream: true.", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise unsupported("prompt_logprobs", "prompt_logprobs is not sent in a stream; leave stream out.")

    def structured(self) -> StructuredOutput | None:
        """What the answer must be, from whichever field says so.

        Raises:
            RequestError: ``invalid_parameter`` when several do.
        """
        guided = {name: value for name in _GUIDED if (value := getattr(self, f"guided_{name}")) is not None}
        asked: list[tuple[str, StructuredOutput]] = []
        if self.response_format is not None and (found := self.response_format.structured()) is not None:
            asked.append(("response_format", found))
        if self.structured_outputs is not None:
            asked.append(("structured_outputs", self.structured_outputs.structured()))
        if guided:
            asked.append((f"guided_{min(guided)}", StructuredOutputs.model_validate(guided).structured()))
        if len(asked) > 1:
            names = " and ".join(name for name, _ in asked)
            raise RequestError("invalid_parameter", f"{names} cannot be asked for together.", asked[-1][0])
        return asked[0][1] if asked else None

    @property
    def usage_options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


R = TypeVar("R", bound=Strict)


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


def _request_error(fault: ErrorDetails, model: type[Strict]) -> RequestError:
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


def unsupported(field: str, message: str) -> RequestError:
    return RequestError("unsupported_parameter", message, field)
