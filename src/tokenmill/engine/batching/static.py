"""Static batching, a baseline: whatever waits forms a batch, which runs until its last request ends.

The padding is really computed, so that a comparison with `continuous` is honest.
"""

from tokenmill.engine.policy import PaddedBatching


class Static(PaddedBatching):
    def ready(self, waiting: int, oldest_wait: float) -> bool:
        return True


BATCHING = Static
