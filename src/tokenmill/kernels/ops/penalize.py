"""penalize: make tokens that stand in a row's history less likely, or more.

    penalize(logits[R, V] float32, history[H] int64, starts[R+1] int64, prompt_lens[R] int64,
             repetition[R] float32, frequency[R] float32, presence[R] float32) -> None

Mutates logits. Row r's history is ``history[starts[r] : starts[r + 1]]``: first the ``prompt_lens[r]`` tokens of the
prompt, then the output. Each token in it has its logit, once,

* divided by ``repetition[r]`` if that is positive, else multiplied by it (CTRL, arXiv 1909.05858), and then,
* if it stands in the output, lowered by ``count * frequency[r] + presence[r]``, count being how often it stands there.

A row's result depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["cases", "reference"]


def reference(
    logits: Tensor,
    history: Tensor,
    starts: Tensor,
    prompt_lens: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """See the module's docstring."""
    for row, own in enumerate(logits):
        known = history[starts[row] : starts[row + 1]]
        seen = known.unique()  # type: ignore[no-untyped-call]
        values = own[seen]
        own[seen] = torch.where(values > 0, values / repetition[row], values * repetition[row])
        output, counts = known[prompt_lens[row] :].unique(return_counts=True)  # type: ignore[no-untyped-call]
        own[output] -= counts.to(logits.dtype) * frequency[row] + presence[row]


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Named positional arguments."""
    random = torch.Generator().manual_seed(0)
    for name, vocabulary, lengths, prompt_lens, values in (
        ("one", 1, [1], [0], (1.3, 0.5, 0.25)),
        ("no_history", 5, [0, 0], [0, 0], (1.3, 0.5, 0.25)),
        ("prompt_alone", 40, [30], [30], (1.3, 0.5, 0.25)),
        ("output_alone", 40, [0, 90], [0, 0], (1.1, 0.3, -0.7)),
        ("mixed", 300, [100, 1, 0, 700, 33], [60, 1, 0, 20, 32], (0.8, 0.1, 0.2)),
        ("nothing_asked", 40, [30, 30], [10, 10], (1.0, 0.0, 0.0)),
    ):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        logits = torch.randn(len(lengths), vocabulary, generator=random)
        logits[0, :3] = torch.tensor([float("-inf"), 0.0, -0.0])[:vocabulary]
        history = torch.randint(vocabulary, (sum(lengths),), generator=random)
        scaled = (torch.full((len(lengths),), value) for value in values)
        yield name, (logits, history, ends, torch.tensor(prompt_lens), *scaled)
