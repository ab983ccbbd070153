"""sample: choose one token per row.

    sample(logits[R, V] float32, temperature[R] float32, top_k[R] int64, top_p[R] float32, min_p[R] float32,
           uniform[R] float64 in [0, 1)) -> [R] int64

Temperature 0 takes the most likely token, the lowest id among equals. Otherwise the probabilities are those of
softmax(logits / temperature), from which is kept, in this order:

* top_k: the k most likely tokens (0 keeps all);
* top_p: of these, renormalised, the fewest most likely ones that reach this probability together (1 keeps all);
  nucleus sampling, Holtzman et al., arXiv 1904.09751;
* min_p: of these, the ones at least this times as likely as the most likely one (0 keeps all); arXiv 2407.01082.

Among equally likely tokens the lowest id goes first; the most likely token is always kept. One token is taken by
inverting the cumulative distribution at the row's uniform: in order of ids if nothing was asked to be cut, else in
descending order of probability. A row's result depends on that row alone. Nothing is mutated. A token of logit -inf is
never taken as long as another is possible.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cases", "reference"]

_CANDIDATES = (256, 4096)
"""Most likely tokens to look at before the whole vocabulary is sorted. Nearly always the first number suffices."""
_CHUNK = 1 << 19
"""Probabilities to hold at a time; more would leave the CPU's caches."""
_SEGMENT = 512
"""Tokens whose probabilities are summed up before the search for the one to take."""


def reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """See the module's docstring."""
    vocabulary = logits.shape[1]
    greedy = temperature == 0
    cut = ~greedy & (((top_k > 0) & (top_k < vocabulary)) | (top_p < 1) | (min_p > 0))
    if greedy.all():
        return logits.argmax(dim=-1)
    tokens = torch.empty_like(top_k)
    tokens[greedy] = logits[greedy].argmax(dim=-1)
    at_once = max(1, _CHUNK // vocabulary)
    for rows in torch.split((~greedy & ~cut).nonzero().squeeze(1), at_once):
        tokens[rows] = _sample_whole(_scale(logits[rows], temperature[rows]), uniform[rows])
    for rows in torch.split(cut.nonzero().squeeze(1), at_once):
        probabilities = _scale(logits[rows], temperature[rows]).softmax(dim=-1)
        tokens[rows] = _sample_cut(probabilities, top_k[rows], top_p[rows], min_p[rows], uniform[rows])
    return tokens


def _scale(logits: Tensor, temperature: Tensor) -> Tensor:
    # The largest becomes 0 first: a division by a tiny temperature may overflow to -inf, but not to inf.
    return logits.sub(logits.amax(dim=-1, keepdim=True)).div_(temperature.unsqueeze(1))


def _sample_whole(scaled: Tensor, uniform: Tensor) -> Tensor:
    """Samples rows of which all tokens are kept: finds the segment first, then the token in it."""
    padded = F.pad(scaled, (0, -scaled.shape[1] % _SEGMENT), value=float("-inf"))
    segments = torch.unflatten(padded.softmax(dim=-1), 1, (-1, _SEGMENT))
    before = F.pad(segments.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64), (1, 0))
    target = uniform.unsqueeze(1) * before[:, -1:]
    segment = _first_above(before[:, 1:].contiguous(), target)
    within = segments.take_along_dim(segment.unsqueeze(2), dim=1).squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    place = _first_above(within, target - before.gather(1, segment))
    return (segment * _SEGMENT + place).clamp(max=scaled.shape[1] - 1).squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first index [R, 1] at which cumulative[R, N] exceeds target[R, 1], else the last at which it still grows."""
    index = torch.searchsorted(cumulative, target, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return index.minimum(last).clamp(max=cumulative.shape[1] - 1)  # not a number compares like nothing else


def _sample_cut(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Samples rows of which not all tokens are kept, each from the fewest candidates that are sure to suffice."""
    vocabulary = probabilities.shape[1]
    tokens = torch.empty_like(top_k)
    rows = torch.arange(len(tokens), device=tokens.device)
    for width in (*(width for width in _CANDIDATES if 4 * width < vocabulary), vocabulary):
        ids = _most_likely(probabilities[rows], width)
        descending, order = probabilities[rows].gather(1, ids).sort(dim=-1, descending=True, stable=True)
        place, kept = _sample_sorted(descending, top_k[rows], top_p[rows], min_p[rows], uniform[rows])
        tokens[rows] = ids.gather(1, order.gather(1, place)).squeeze(1)
        # Which of the equals of the last candidate are candidates is chance, so what is kept must end before them.
        sure = (top_k[rows] <= width) & (descending.gather(1, kept - 1) > descending[:, -1:]).squeeze(1)
        rows = rows[~sure]
        if len(rows) == 0:
            break
    return tokens


def _most_likely(probabilities: Tensor, width: int) -> Tensor:
    """Ids of the `width` most likely tokens of each row, ascending, so that a stable sort puts low ids first."""
    if width == probabilities.shape[1]:
        return torch.arange(width, device=probabilities.device).expand_as(probabilities)
    return probabilities.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values


def _sample_sorted(
    descending: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Samples from the largest probabilities of each row: the chosen place [R, 1], and how many were kept [R, 1].

    All three rules keep a prefix. Sums run from the front, so a longer row of candidates gives the same bits.
    """
    width = descending.shape[1]
    top_k, top_p, min_p, uniform = (column.unsqueeze(1) for column in (top_k, top_p, min_p, uniform))
    cumulative = descending.cumsum(dim=-1, dtype=torch.float64)
    by_k = torch.where(top_k > 0, top_k, width).clamp(max=width)
    mass = torch.where(top_k > 0, cumulative.gather(1, by_k - 1), 1.0)
    enough = torch.where(top_p < 1, top_p.double() * mass, float("inf"))
    by_p = (cumulative - descending < enough).sum(dim=-1, keepdim=True)
    likely = (descending >= min_p * descending[:, :1]) & (descending > 0)
    by_min_p = likely.sum(dim=-1, keepdim=True)
    kept = by_k.minimum(by_p).minimum(by_min_p).clamp(min=1)
    total = cumulative.gather(1, kept - 1)
    return _first_above(cumulative.minimum(total), uniform * total), kept


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Named positional arguments."""
    random = torch.Generator().manual_seed(0)
    for name, vocabulary, scale, settings in (
        ("one_token", 1, 1.0, [(1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (1.0, 1, 0.5, 0.5)]),
        ("greedy", 37, 1.0, [(0.0, 0, 1.0, 0.0), (0.0, 5, 0.5, 0.1)]),
        ("whole", 37, 1.0, [(1.0, 0, 1.0, 0.0), (0.3, 37, 1.0, 0.0), (2.0, 100, 1.0, 0.0)]),
        ("cut", 301, 2.0, [(1.0, 7, 1.0, 0.0), (0.7, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1), (1.5, 50, 0.9, 0.05)]),
        ("mixed", 129, 1.0, [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 3, 0.5, 0.0)]),
        ("large_vocabulary", 5003, 3.0, [(1.0, 20, 0.9, 0.0), (1.0, 2000, 1.0, 0.0), (9.0, 0, 0.99, 0.0)]),
        ("extreme", 64, 1e4, [(1.0, 0, 1.0, 0.0), (1e-5, 0, 0.9, 0.0), (100.0, 5, 1.0, 0.0)]),
        ("no_rows", 16, 1.0, []),
    ):
        logits = torch.randn(len(settings), vocabulary, generator=random) * scale
        yield name, (logits, *_columns(settings), torch.rand(len(settings), generator=random, dtype=torch.float64))
    ties = torch.tensor([[1.0, 2.0, 2.0, 0.0]] * 2 + [[float("-inf"), 0.0, float("-inf"), 0.0]])
    settings = [(0.0, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 0, 1.0, 0.0)]
    yield "ties_and_forbidden", (ties, *_columns(settings), torch.tensor([0.9, 0.9, 0.6], dtype=torch.float64))


def _columns(settings: list[tuple[float, int, float, float]]) -> tuple[Tensor, ...]:
    temperature, top_k, top_p, min_p = zip(*settings, strict=True) if settings else ((), (), (), ())
    return (
        torch.tensor(temperature, dtype=torch.float32),
        torch.tensor(top_k, dtype=torch.int64),
        torch.tensor(top_p, dtype=torch.float32),
        torch.tensor(min_p, dtype=torch.float32),
    )
