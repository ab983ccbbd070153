"""How well two texts match: what a scorer is, and how it and the embeddings endpoint put their questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, cast

from starlette.requests import Request

from tokenmill.errors import RequestError
from tokenmill.llm import AsyncLLM, Prompt
from tokenmill.server.call import call_of
from tokenmill.server.generation import Usage, last_outputs
from tokenmill.server.schemas.request import Whole
from tokenmill.server.service import service_of
from tokenmill.types import PoolingParams, RequestOutput, SamplingParams

__all__ = ["Ask", "Asker", "Pair", "Question", "Scorer", "scorer_of"]

Pair = tuple[str, str]
"""A query and a document."""

_NO_TOKENS = SamplingParams(max_tokens=None)


@dataclasses.dataclass(frozen=True)
class Question:
    """One thing to ask of the engine: an embedding when `pooling` says how, else tokens."""

    prompt: Prompt
    pooling: PoolingParams | None = None
    params: SamplingParams = _NO_TOKENS


Ask = Callable[[Sequence[Question]], Awaitable[list[RequestOutput]]]
"""Asks all questions at once; the complete outputs come in their order."""


class Scorer(Protocol):
    """Gives pairs of texts a score: the more the document says about the query, the higher."""

    async def score(self, llm: AsyncLLM, pairs: Sequence[Pair], ask: Ask) -> list[float]:
        """One score per pair.

        Args:
            llm: for its tokenizer and settings; the engine is reached through `ask` alone, which keeps the books.

        Raises:
            RequestError: the model cannot score in this way.
        """


def scorer_of(request: Request) -> Scorer:
    """The scorer that the server was started with."""
    return cast(Scorer, request.app.state.scorer)


class Asker:
    """Puts the questions of one HTTP request to the engine, each as a call of its own, and counts their tokens.

    Args:
        answer_id: of the whole answer; the calls add their number.
        field: of the body, which errors about a prompt are to name.
    """

    def __init__(self, request: Request, body: Whole, model: str, answer_id: str, field: str) -> None:
        self.usage = Usage()
        self._request, self._body, self._model = request, body, model
        self._id, self._field = answer_id, field
        self._asked = 0

    async def __call__(self, questions: Sequence[Question]) -> list[RequestOutput]:
        service = service_of(self._request)
        first, self._asked = self._asked, self._asked + len(questions)
        calls = [
            call_of(
                self._request, self._body, self._model, f"{self._id}-{number}", each.prompt, each.params,
                pooling=each.pooling,
            )
            for number, each in enumerate(questions, first)
        ]  # fmt: skip
        try:
            outputs = await last_outputs([service.generate(call) for call in calls])
        except RequestError as error:
            field = self._field if error.field == "prompt" else error.field
            raise RequestError(error.code, error.message, field) from None
        for number, output in enumerate(outputs, first):
            self.usage.add(number, output)
        return outputs
