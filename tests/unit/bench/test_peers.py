"""The parts of benchmarks/peers that need no peer: arithmetic of the table and the drivers' protocol."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

PEERS = Path(__file__).resolve().parents[3] / "benchmarks" / "peers"


def load(name: str) -> ModuleType:
    """A benchmark's module by its path: benchmarks are not on the path of the tests."""
    spec = importlib.util.spec_from_file_location(f"peers_{Path(name).stem}", PEERS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


table = load("table.py")
protocol = load("drivers/protocol.py")


def sample(peer: str, took: float = 1.0, **figures: float) -> dict[str, object]:
    return {"workload": "w1", "peer": peer, "repeat": 0, "took": took, "ceilings": {}, "figures": figures}


class TestSummary:
    def test_each_peer_gets_median_and_range_of_its_own_figures(self):
        found = table.summary(
            [sample("a", decode=1.0), sample("a", decode=9.0), sample("a", decode=2.0), sample("b", decode=5.0)]
        )
        assert found["w1"]["decode"]["a"] == {"median": 2.0, "min": 1.0, "max": 9.0, "n": 3}
        assert found["w1"]["decode"]["b"]["median"] == 5.0


class TestAgainstBestRival:
    def test_of_rates_the_highest_rival_counts(self):
        assert table.against_best_rival({"tokenmill": 30.0, "a": 10.0, "b": 20.0}, "decode") == ("b", 1.5)

    @pytest.mark.parametrize("metric", sorted(table.LOWER_IS_BETTER))
    def test_of_times_and_memory_the_lowest_rival_counts_and_more_than_one_is_still_ahead(self, metric: str):
        assert table.against_best_rival({"tokenmill": 2.0, "a": 5.0, "b": 4.0}, metric) == ("b", 2.0)

    @pytest.mark.parametrize("medians", [{"tokenmill": 1.0}, {"a": 1.0}, {}])
    def test_without_both_there_is_no_ratio(self, medians: dict[str, float]):
        assert table.against_best_rival(medians, "decode") is None


class TestLeft:
    def test_without_samples_all_repeats_are_left(self):
        assert list(table.left([], "w1", "a", 3, 10.0)) == [0, 1, 2]

    def test_what_is_there_is_not_measured_again(self):
        assert list(table.left([sample("a"), sample("a")], "w1", "a", 5, 1e9)) == [2, 3, 4]

    def test_other_peers_and_workloads_do_not_count(self):
        assert list(table.left([sample("b")], "w1", "a", 1, 1e9)) == [0]
        assert list(table.left([sample("a")], "w2", "a", 1, 1e9)) == [0]

    def test_the_limit_shortens_but_one_repeat_is_always_done(self):
        assert list(table.left([sample("a", took=4.0)], "w1", "a", 5, 10.0)) == [1]
        assert list(table.left([sample("a", took=40.0)], "w1", "a", 5, 10.0)) == []
        assert 0 in table.left([], "w1", "a", 5, 0.0)


class Echo:
    """A peer that notes what it is set up for and generates what is asked."""

    def __init__(self) -> None:
        self.versions = {"echo": "1"}
        self.shapes: list[object] = []

    def prepare(self, shape: object) -> None:
        self.shapes.append(shape)

    def serve(self, requests: list[tuple[list[int], int]]) -> object:
        return protocol.Served(2.0, [float(len(ids)) for ids, _ in requests], [tokens for _, tokens in requests])


def test_a_driver_says_ready_and_answers_each_command_with_one_line():
    commands = [{"prepare": {"requests": 2, "tokens": 9, "shared_prefix": 0}}, {"serve": [[[1, 2, 3], 4], [[5], 6]]}]
    answers = io.StringIO()
    peer = Echo()
    protocol.answer(peer, io.StringIO("".join(json.dumps(command) + "\n" for command in commands)), answers)
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [
        {"ready": {"echo": "1"}},
        {"prepared": True},
        {"seconds": 2.0, "first": [3.0, 1.0], "tokens": [4, 6]},
    ]
    assert peer.shapes == [protocol.Shape(requests=2, tokens=9, shared_prefix=0)]
