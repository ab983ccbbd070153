"""From samples to medians, ratios and a table. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OURS = "tokenmill"
LOWER_IS_BETTER = frozenset({"start to first token", "mean time to first token", "time", "peak memory"})
"""Metrics of which less is better."""

Sample = dict[str, Any]
"""One served workload of one peer: `workload`, `peer`, `repeat`, `figures` by metric, `ceilings` read just before."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def summary(samples: Iterable[Sample]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """The spread by workload, metric and peer."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for sample in samples:
        for metric, figure in sample["figures"].items():
            values.setdefault(sample["workload"], {}).setdefault(metric, {}).setdefault(sample["peer"], []).append(
                figure
            )
    return {
        workload: {
            metric: {peer: spread(figures) for peer, figures in peers.items()} for metric, peers in metrics.items()
        }
        for workload, metrics in values.items()
    }


def against_best_rival(medians: Mapping[str, float], metric: str) -> tuple[str, float] | None:
    """The best rival of tokenmill and how many times better tokenmill is; None without both.

    Of times and memory it is the rival's over tokenmill's, so that more than 1 is always ahead.
    """
    rivals = {peer: value for peer, value in medians.items() if peer != OURS}
    if not rivals or OURS not in medians:
        return None
    lower = metric in LOWER_IS_BETTER
    best = (min if lower else max)(rivals, key=rivals.__getitem__)
    ours, theirs = medians[OURS], rivals[best]
    return best, theirs / ours if lower else ours / theirs


def left(samples: Iterable[Sample], workload: str, peer: str, repeats: int, limit: float) -> range:
    """The repeats of a workload that a peer still has to do.

    Args:
        samples: those there are; of one of another workload or peer nothing follows.
        limit: seconds for all repeats of it; what takes longer gets fewer, but always one.
    """
    took = [each["took"] for each in samples if (each["workload"], each["peer"]) == (workload, peer)]
    if took:
        repeats = max(1, min(repeats, int(limit // max(took))))
    return range(len(took), repeats)
