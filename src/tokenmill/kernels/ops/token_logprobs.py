"""token_logprobs: log probabilities of given tokens, and the most likely ones beside them.

    token_logprobs(logits[R, V] float32, tokens[R] int64, k) ->
        logprob of the token [R] float32, its rank [R] int64, top ids [R, k] int64, top logprobs [R, k] float32

The log probabilities are those of softmax(logits). The rank is 1 for a most likely token: one more than the number of
strictly likelier ones. Top ids come most likely first; among equals the order is free. k may be 0. Nothing is mutated.
A row's result does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["cases", "reference"]


def reference(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the module's docstring."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = tokens.unsqueeze(1)
    # Counted on the logits: log probabilities of different logits may round to the same number.
    rank = (logits > logits.gather(1, chosen)).sum(dim=-1) + 1
    top_ids = logits.topk(k, dim=-1).indices
    return logprobs.gather(1, chosen).squeeze(1), rank, top_ids, logprobs.gather(1, top_ids)


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Named positional arguments."""
    random = torch.Generator().manual_seed(0)
    for name, rows, vocabulary, k, scale in (
        ("one", 1, 1, 1, 1.0),
        ("odd", 5, 37, 3, 1.0),
        ("none_beside", 4, 129, 0, 1.0),
        ("whole_vocabulary", 3, 11, 11, 1.0),
        ("extreme", 3, 1000, 5, 1e4),
        ("no_rows", 0, 16, 2, 1.0),
    ):
        logits = torch.randn(rows, vocabulary, generator=random) * scale
        yield name, (logits, torch.randint(0, vocabulary, (rows,), generator=random), k)
    forbidden = torch.tensor([[0.5, float("-inf"), 2.0, float("-inf")]])
    yield "forbidden", (forbidden, torch.tensor([0]), 2)
