"""The KV manager: hits, copy-on-write, windows, pins, and what a miss is called."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from tokenmill.engine.events import EventLog
from tokenmill.engine.kv.manager import KVManager
from tokenmill.engine.kv.pool import NULL_BLOCK
from tokenmill.engine.kv.prefix import Fingerprint
from tokenmill.engine.kv.sequence import Sequence
from tokenmill.errors import RequestError
from tokenmill.testing import FakeClock, fake_facts

SIZE = 4


def make(num_blocks: int = 32, windows=(None,), **options) -> KVManager:
    facts = fake_facts(num_blocks, SIZE, windows=windows)
    clock = options.pop("clock", FakeClock())
    return KVManager(facts.layout, num_blocks, 8, clock, EventLog(100), **options)


def sequence(tokens, salt: str = "", adapter: str = "") -> Sequence:
    return Sequence(tokens, Fingerprint(SIZE, salt, adapter))


def compute(manager: KVManager, seq: Sequence, chunk: int = 8) -> list[tuple[int, int]]:
    """Computes all known tokens; returns the copies that were needed."""
    copies = []
    while seq.pending:
        count = min(chunk, seq.pending)
        copies += manager.grow(seq, count)
        seq.computed += count
        manager.commit(seq)
    return copies


def serve(manager: KVManager, tokens, **keys) -> Sequence:
    seq = sequence(tokens, **keys)
    hit = manager.lookup(seq)
    assert manager.can_admit(seq, hit, reserve=0)
    manager.admit(seq, hit)
    compute(manager, seq)
    return seq


def test_a_second_request_hits_the_full_blocks_of_the_first():
    manager = make()
    first = serve(manager, range(10))
    hit = manager.lookup(sequence(range(11)))
    assert hit.tokens == 8
    assert list(hit.tables[0]) == first.tables[0][:2]


def test_a_hit_survives_the_end_of_the_request_that_computed_it():
    manager = make()
    manager.release(serve(manager, range(9)))
    assert manager.pool.available == manager.pool.usable
    assert manager.lookup(sequence(range(9))).tokens == 8


def test_the_last_token_is_always_computed_and_a_shared_block_is_copied_before_it_is_written():
    manager = make()
    first = serve(manager, range(8))
    second = sequence(range(8))
    hit = manager.lookup(second)
    assert hit.tokens == 7
    manager.admit(second, hit)
    shared = second.tables[0][1]
    assert shared == first.tables[0][1]
    assert compute(manager, second) == [(shared, second.tables[0][1])]
    assert first.tables[0][1] == shared != second.tables[0][1]


def test_a_fork_shares_the_partly_filled_block_until_one_side_writes():
    manager = make()
    parent = serve(manager, range(6))
    child = sequence(range(6))
    assert manager.can_fork(parent, child)
    before = manager.pool.available
    manager.fork(parent, child)
    assert manager.pool.available == before
    parent.tokens.append(7)
    assert len(compute(manager, parent)) == 1
    assert compute(manager, child) == []  # the other side is now the only owner


def test_at_most_one_partly_filled_block_per_sequence():
    manager = make()
    for length in range(1, 20):
        seq = serve(manager, [length] * length)
        assert len(seq.tables[0]) == -(-length // SIZE)
        manager.release(seq)


def test_window_layers_stop_growing_and_full_layers_do_not():
    manager = make(windows=(None, 6))
    seq = serve(manager, range(40))
    held = [sum(block != NULL_BLOCK for block in table) for table in seq.tables]
    assert held[0] == 10
    assert held[1] <= -(-(6 - 1) // SIZE) + 1
    manager.release(seq)
    assert manager.pool.available == manager.pool.usable


def test_a_window_group_can_serve_a_prefix_whose_beginning_it_has_given_back():
    manager = make(windows=(None, 6))
    manager.release(serve(manager, range(24)))
    hit = manager.lookup(sequence([*range(24), 99]))
    assert hit.tokens == 24
    assert hit.tables[1][0] == NULL_BLOCK
    assert all(block != NULL_BLOCK for block in hit.tables[1][-2:])


@pytest.mark.parametrize(
    ("prepare", "prompt", "expected"),
    [
        (lambda m: None, dict(tokens=range(10)), {"cold": 8, "partial_block": 2}),
        (lambda m: serve(m, range(8)), dict(tokens=range(8)), {"last_token": 1}),
        (lambda m: serve(m, range(8)), dict(tokens=range(10)), {"partial_block": 2}),
        (lambda m: serve(m, range(8), salt="a"), dict(tokens=range(9), salt="b"), {"salt": 8, "partial_block": 1}),
        (lambda m: serve(m, range(8)), dict(tokens=range(9), adapter="x"), {"adapter": 8, "partial_block": 1}),
        (lambda m: serve(m, range(8)), dict(tokens=[*range(4), *[9] * 5]), {"cold": 4, "partial_block": 1}),
    ],
)
def test_each_uncached_prompt_token_has_a_reason(prepare, prompt, expected):
    manager = make()
    prepare(manager)
    seq = sequence(**prompt)
    hit = manager.lookup(seq)
    misses = manager.explain_misses(seq, hit)
    assert misses == expected
    assert hit.tokens + sum(misses.values()) == seq.prompt_len


def test_evicted_content_is_remembered_as_evicted():
    manager = make(num_blocks=6)
    manager.release(serve(manager, range(12)))
    manager.release(serve(manager, [50] * 20))
    seq = sequence(range(12))
    assert manager.explain_misses(seq, manager.lookup(seq)) == {"evicted": 12}


def test_unused_content_expires():
    clock = FakeClock()
    manager = make(clock=clock, ttl_s=10.0)
    manager.release(serve(manager, range(8)))
    clock.advance(9)
    assert manager.lookup(sequence(range(9))).tokens == 8
    clock.advance(2)
    seq = sequence(range(9))
    hit = manager.lookup(seq)
    assert hit.tokens == 0
    assert manager.explain_misses(seq, hit) == {"expired": 8, "partial_block": 1}
    assert manager.pool.cached < 2


def test_caching_switched_off_finds_and_keeps_nothing():
    manager = make(prefix_caching=False)
    manager.release(serve(manager, range(8)))
    seq = sequence(range(8))
    assert manager.explain_misses(seq, manager.lookup(seq)) == {"disabled": 8}
    assert manager.pool.cached == 0


def test_a_pin_outlives_pressure_and_ends_in_time():
    clock = FakeClock()
    manager = make(num_blocks=8, clock=clock)
    manager.release(serve(manager, range(8)))
    assert manager.pin("system", list(range(8)), keep=16, ttl_s=5.0) == 8
    manager.release(serve(manager, [60] * 20))
    assert manager.lookup(sequence(range(9))).tokens == 8
    clock.advance(6)
    manager.expire_pins()
    manager.release(serve(manager, [70] * 28))
    assert manager.lookup(sequence(range(9))).tokens == 0
    assert manager.unpin("system") is False


def test_a_pin_that_would_leave_no_room_is_refused():
    manager = make(num_blocks=8)
    manager.release(serve(manager, range(20)))
    with pytest.raises(RequestError) as refused:
        manager.pin("all", list(range(20)), keep=16)
    assert refused.value.code == "pin_too_large"
    assert manager.pinned == 0


class Manager(RuleBasedStateMachine):
    """Random admissions, growth, forks, preemptions and ends in a tiny pool with a full and a window group."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.manager = make(num_blocks=24, windows=(None, 6), eviction="cost")
        self.live: list[Sequence] = []

    @rule(
        target=held,
        stem=st.integers(0, 2),
        length=st.integers(1, 30),
        salt=st.sampled_from(["", "a"]),
    )
    def admit(self, stem, length, salt):
        seq = sequence([stem * 10 + index % 7 for index in range(length)], salt)
        hit = self.manager.lookup(seq)
        assert hit.tokens < length
        if self.manager.can_admit(seq, hit, reserve=0):
            before = self.manager.pool.available
            self.manager.admit(seq, hit)
            assert self.manager.pool.available >= 0
            assert before >= self.manager.pool.available
            self.live.append(seq)
        return seq

    @rule(seq=held, count=st.integers(1, 8))
    def grow(self, seq, count):
        if not seq.tables:
            return
        if not seq.pending:
            seq.tokens.append(count)
        count = min(count, seq.pending)
        if not self.manager.can_grow(seq, count):
            return
        self.manager.grow(seq, count)
        for table in seq.tables:
            for block in table[seq.computed // SIZE :]:
                assert self.manager.pool.references(block) == 1, "a block to be written is shared"
        seq.computed += count
        self.manager.commit(seq)

    @rule(target=held, parent=held)
    def fork(self, parent):
        child = sequence(parent.tokens[: parent.prompt_len], parent.fingerprint.identity[0])
        if parent.tables and self.manager.can_fork(parent, child):
            self.manager.fork(parent, child)
            self.live.append(child)
        return child

    @rule(seq=consumes(held))
    def release(self, seq):
        if seq.tables:
            self.live.remove(seq)
        self.manager.release(seq)

    @invariant()
    def references_equal_table_entries(self):
        pool = self.manager.pool
        counts = [0] * pool.num_blocks
        for seq in self.live:
            for table in seq.tables:
                for block in table:
                    counts[block] += block != NULL_BLOCK
        assert counts == [pool.references(block) for block in range(pool.num_blocks)]
        assert pool.available == sum(count == 0 for count in counts[1:])

    @precondition(lambda self: not self.live)
    @invariant()
    def nothing_leaks(self):
        assert self.manager.pool.available == self.manager.pool.usable


Manager.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestManager = Manager.TestCase
