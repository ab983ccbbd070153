"""Bodies of the endpoints that compare texts.

Sources: https://jina.ai/reranker (``/v1/rerank``), https://docs.cohere.com/reference/rerank (``/v2/rerank``),
https://docs.vllm.ai/en/latest/serving/openai_compatible_server/#score-api (``/score``)
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tokenmill.errors import RequestError
from tokenmill.server.schemas.embeddings import MOST_TEXTS
from tokenmill.server.schemas.request import Int, Strict, Whole

__all__ = ["RerankRequest", "ScoreRequest"]

_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=MOST_TEXTS)]


class Document(Strict):
    """A document as an object."""

    text: _Text


class RerankRequest(Whole):
    """Body of ``POST /rerank``, ``/v1/rerank`` and ``/v2/rerank``."""

    query: _Text
    documents: Annotated[list[_Text | Document], Field(min_length=1, max_length=MOST_TEXTS)]
    top_n: Annotated[Int, Field(ge=1)] | None = None
    """Return only so many, the best."""
    return_documents: bool | None = None
    """Whether each result holds its text; yes unless said otherwise, but no at ``/v2/rerank``."""

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class ScoreRequest(Whole):
    """Body of ``POST /score`` and ``/v1/score``: one text against one or many, or as many against as many."""

    text_1: _Text | _Texts | None = None
    text_2: _Text | _Texts | None = None
    queries: _Text | _Texts | None = None
    """Another name of `text_1`."""
    documents: _Text | _Texts | None = None
    """Another name of `text_2`."""

    def check(self) -> None:
        for first, second in (("text_1", "queries"), ("text_2", "documents")):
            given = [name for name in (first, second) if getattr(self, name) is not None]
            if not given:
                raise RequestError("missing_parameter", f"{first} is missing.", first)
            if len(given) == 2:
                raise RequestError("invalid_parameter", f"{first} and {second} are two names of one thing.", second)
        self.pairs()

    def pairs(self) -> list[tuple[str, str]]:
        """What to compare with what.

        Raises:
            RequestError: ``invalid_parameter`` when there are not as many on both sides.
        """
        left = _listed(self.queries if self.text_1 is None else self.text_1)
        right = _listed(self.documents if self.text_2 is None else self.text_2)
        if len(left) == 1:
            left *= len(right)
        if len(left) != len(right):
            field = "documents" if self.text_2 is None else "text_2"
            raise RequestError(
                "invalid_parameter", f"{len(left)} texts cannot be compared with {len(right)} one by one.", field
            )
        return list(zip(left, right, strict=True))


def _listed(texts: str | list[str] | None) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts or ())
