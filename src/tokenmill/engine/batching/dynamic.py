"""Dynamic batching, a baseline: a batch starts when it is full or its first request has waited `batch_wait_ms`."""

from tokenmill.engine.policy import PaddedBatching


class Dynamic(PaddedBatching):
    def ready(self, waiting: int, oldest_wait: float) -> bool:
        return waiting >= self.config.max_num_seqs or oldest_wait * 1e3 >= self.config.batch_wait_ms


BATCHING = Dynamic
