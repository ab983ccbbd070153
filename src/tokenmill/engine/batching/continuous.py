"""Continuous batching: a request joins whenever there is room and leaves when it ends (Orca, OSDI 2022)."""

from tokenmill.engine.policy import Batching


class Continuous(Batching):
    def admits(self, running: int, waiting: int, oldest_wait: float) -> bool:
        return waiting > 0


BATCHING = Continuous
