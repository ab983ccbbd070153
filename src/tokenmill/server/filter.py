"""Content filters: what they are, and where they stand in the way of a text.

A file in ``server/filters/`` is one filter. Prompts pass `FilterChain.text` and `FilterChain.messages` before they are
rendered; answers pass `FilterChain.answer` on their way from the engine, whole or in pieces, before anything reads
them: so what a filter takes out is in no endpoint's answer, in no tool call and in no thoughts.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from tokenmill.errors import ConfigError, RequestError
from tokenmill.server.config import FILTERS, FilterConfig
from tokenmill.types import CompletionOutput, FinishReason, RequestOutput, SamplingParams

__all__ = ["Blocked", "Filter", "FilterChain", "TextFilter", "refusal"]


class Blocked(Exception):
    """Raised by a `TextFilter`: the answer must end here.

    Args:
        text: what may still go out.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__("the answer was ended by a filter")
        self.text = text


class TextFilter(Protocol):
    """Reads one answer. How it is split into pieces makes no difference to what comes out."""

    async def push(self, text: str) -> str:
        """Takes the next piece and returns what may go out by now. Raises `Blocked` to end the answer."""

    async def finish(self) -> str:
        """Returns what is left. Raises `Blocked` as well."""


class Filter(ABC):
    """One filter. Shared by all requests."""

    @abstractmethod
    async def text(self, text: str) -> str:
        """A text of a prompt as the model shall see it.

        Raises:
            RequestError: ``content_refused`` (make it with `refusal`).
        """

    @abstractmethod
    def stream(self) -> TextFilter:
        """A filter for one answer."""


def refusal(name: str, why: str) -> RequestError:
    """The error of a filter that refuses a prompt. `why` must not quote it."""
    return RequestError("content_refused", f"The filter {name!r} refuses this content: {why}.")


@dataclasses.dataclass(frozen=True)
class FilterChain:
    """The filters of a server, in order: each sees what the one before left."""

    filters: tuple[Filter, ...] = ()

    @classmethod
    def of(cls, config: FilterConfig) -> FilterChain:
        """The filters that the options name.

        Raises:
            ConfigError: ``unknown_choice``, ``repeated_filter``, or what a filter says about its own options.
        """
        if len(set(config.filters)) < len(config.filters):
            raise ConfigError("repeated_filter", "Each filter can be named once.", "filters")
        return cls(tuple(FILTERS.get(name)(config) for name in config.filters))

    def check(self, params: SamplingParams) -> None:
        """Refuses what would show tokens that filters take out.

        Raises:
            RequestError: ``logprobs_filtered``.
        """
        if self.filters and params.logprobs is not None:
            raise RequestError(
                "logprobs_filtered",
                "This server filters answers, and log probabilities would show what it takes out; leave them away.",
                "logprobs",
            )

    async def text(self, text: str) -> str:
        """A text of a prompt, filtered.

        Raises:
            RequestError: ``content_refused``.
        """
        for each in self.filters:
            text = await each.text(text)
        return text

    async def prompt(self, prompt: str | list[int], decode: Callable[[Sequence[int]], str]) -> str | list[int]:
        """A prompt, filtered. Token ids are read as text, and stay as they are when no filter changes that.

        Raises:
            RequestError: ``content_refused``.
        """
        if not self.filters:
            return prompt
        if isinstance(prompt, str):
            return await self.text(prompt)
        text = decode(prompt)
        filtered = await self.text(text)
        return prompt if filtered == text else filtered

    async def messages(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """A conversation, filtered: contents, thoughts, and the arguments of calls.

        Raises:
            RequestError: ``content_refused``.
        """
        if not self.filters:
            return messages
        return [await self._message(message) for message in messages]

    async def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        changed = dict(message)
        for name in ("content", "reasoning_content", "refusal"):
            if changed.get(name):
                changed[name] = await self._content(changed[name])
        if changed.get("tool_calls"):
            changed["tool_calls"] = [await self._call(call) for call in changed["tool_calls"]]
        return changed

    async def _content(self, content: Any) -> Any:
        """A text, or a list of parts of which some hold a text."""
        if isinstance(content, str):
            return await self.text(content)
        if not isinstance(content, list):
            return content
        parts = []
        for part in content:
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                part = {**part, "text": await self.text(part["text"])}
            elif isinstance(part, str):
                part = await self.text(part)
            parts.append(part)
        return parts

    async def _call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call.get("function") or {}
        if not isinstance(function.get("arguments"), str):
            return call
        return {**call, "function": {**function, "arguments": await self.text(function["arguments"])}}

    def stream(self) -> TextFilter:
        """A filter for one answer."""
        return _Pipeline([each.stream() for each in self.filters])

    def answer(
        self, outputs: AsyncGenerator[RequestOutput, None], n: int, delta: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one call, filtered. A completion that a filter ends has the finish reason `content_filter`.

        Args:
            n: how many completions there are.
            delta: whether each output holds only what is new.
        """
        return _filtered(self, outputs, n, delta) if self.filters else outputs


class _Pipeline:
    """Filters one after the other."""

    def __init__(self, stages: Sequence[TextFilter]) -> None:
        self._stages = stages

    async def push(self, text: str) -> str:
        return await self._through(text, final=False)

    async def finish(self) -> str:
        return await self._through("", final=True)

    async def _through(self, text: str, final: bool) -> str:
        blocked = False
        for stage in self._stages:
            out = ""
            try:
                if text:
                    out = await stage.push(text)
                if final or blocked:
                    out += await stage.finish()
            except Blocked as end:
                out += end.text
                blocked = True  # what it let through is the end of the text for the others
            text = out
        if blocked:
            raise Blocked(text)
        return text


class _Answer:
    """One completion on its way through the filters."""

    def __init__(self, stream: TextFilter, delta: bool) -> None:
        self._stream = stream
        self._delta = delta
        self._taken = 0
        """Characters that the filters have seen, where outputs hold everything so far."""
        self._text = ""
        self.last: CompletionOutput

    @property
    def ended(self) -> bool:
        return self.last.finish_reason is not None

    async def take(self, completion: CompletionOutput) -> None:
        """Makes `last` of `completion`, with the text that may go out."""
        new = completion.text[self._taken :]
        reason = completion.finish_reason
        out = ""
        try:
            if new:
                out = await self._stream.push(new)
            if reason is not None:
                out += await self._stream.finish()
        except Blocked as end:
            out += end.text
            reason = FinishReason.CONTENT_FILTER
        if not self._delta:
            self._taken += len(new)
            self._text += out
        text = out if self._delta else self._text
        self.last = msgspec.structs.replace(completion, text=text, finish_reason=reason)


async def _filtered(
    chain: FilterChain, outputs: AsyncGenerator[RequestOutput, None], n: int, delta: bool
) -> AsyncGenerator[RequestOutput, None]:
    answers: dict[int, _Answer] = {}
    async for output in outputs:
        shown = []
        for completion in output.outputs:
            answer = answers.get(completion.index)
            if answer is None:
                answer = answers[completion.index] = _Answer(chain.stream(), delta)
                await answer.take(completion)
            elif not answer.ended:
                await answer.take(completion)
            elif delta:
                continue  # a filter has ended it; what the engine still makes of it goes nowhere
            shown.append(answer.last)
        finished = len(answers) == n and all(answer.ended for answer in answers.values())
        if shown:
            yield msgspec.structs.replace(output, outputs=shown, finished=finished)
        if finished:
            return
