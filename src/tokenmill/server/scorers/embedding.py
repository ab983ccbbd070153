"""The cosine of the angle between the two texts' embeddings, from -1 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from tokenmill.llm import AsyncLLM
from tokenmill.server.scoring import Ask, Pair, Question, Scorer

__all__ = ["SCORER"]


class _Embedding:
    async def score(self, llm: AsyncLLM, pairs: Sequence[Pair], ask: Ask) -> list[float]:
        pooling = msgspec.structs.replace(llm.pooling, normalize=True)
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))  # a query that many share is asked once
        outputs = await ask([Question(text, pooling) for text in texts])
        vectors = {text: np.asarray(output.embedding, np.float64) for text, output in zip(texts, outputs, strict=True)}
        return [math.fsum(vectors[query] * vectors[document]) for query, document in pairs]


SCORER: Scorer = _Embedding()
