import pytest

from tokenmill.engine.kv.eviction import EVICTION, CachedBlock, EvictableBlocks
from tokenmill.engine.kv.pool import NULL_BLOCK, BlockPool


def make_pool(num_blocks: int = 6):
    about: dict[int, CachedBlock] = {}
    forgotten: list[int] = []
    pool = BlockPool(num_blocks, EvictableBlocks(EVICTION["lru"], about.__getitem__), forgotten.append)
    return pool, about, forgotten


def test_the_null_block_is_never_handed_out():
    pool, _, _ = make_pool()
    assert NULL_BLOCK not in {pool.take() for _ in range(pool.usable)}
    assert pool.available == 0


def test_a_block_is_free_again_only_after_its_last_reference():
    pool, _, _ = make_pool()
    block = pool.take()
    pool.share(block)
    pool.release(block, cached=False)
    assert pool.available == pool.usable - 1
    pool.release(block, cached=False)
    assert pool.available == pool.usable


def test_releasing_twice_is_an_error():
    pool, _, _ = make_pool()
    block = pool.take()
    pool.release(block, cached=False)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(block, cached=False)


def test_cached_content_is_evicted_only_when_nothing_is_free():
    pool, about, forgotten = make_pool(num_blocks=3)
    kept = pool.take()
    about[kept] = CachedBlock(b"a", 0, 0, last_used=1.0)
    pool.release(kept, cached=True)
    other = pool.take()
    assert other != kept
    assert forgotten == []
    assert pool.take() == kept
    assert forgotten == [kept]


def test_a_hit_takes_a_block_out_of_the_eviction_order():
    pool, about, forgotten = make_pool(num_blocks=3)
    blocks = [pool.take(), pool.take()]
    for block in blocks:
        about[block] = CachedBlock(bytes([block]), 0, 0, last_used=float(block))
        pool.release(block, cached=True)
    pool.share(min(blocks))  # the least recently used
    assert pool.take() == max(blocks)
    assert forgotten == [max(blocks)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("lru", ["old", "often", "deep"]), ("lfu", ["old", "deep", "often"]), ("cost", ["old", "deep", "often"])],
)
def test_eviction_policies_order_blocks_differently(policy: str, expected: list[str]):
    blocks = {
        1: ("old", CachedBlock(b"1", 0, depth=0, last_used=1.0, uses=1)),
        2: ("often", CachedBlock(b"2", 0, depth=0, last_used=2.0, uses=9)),
        3: ("deep", CachedBlock(b"3", 0, depth=256, last_used=3.0, uses=2)),
    }
    evictable = EvictableBlocks(EVICTION[policy], lambda block: blocks[block][1])
    for block in blocks:
        evictable.add(block)
    assert [blocks[evictable.pop()][0] for _ in range(3)] == expected


def test_of_equal_blocks_the_deepest_goes_first():
    about = {index: CachedBlock(b"", 0, depth=index, last_used=5.0) for index in range(1, 5)}
    evictable = EvictableBlocks(EVICTION["lru"], about.__getitem__)
    for block in about:
        evictable.add(block)
    assert [evictable.pop() for _ in range(4)] == [4, 3, 2, 1]


def test_the_eviction_heap_does_not_grow_with_hits():
    about = {index: CachedBlock(b"", 0, 0, last_used=0.0) for index in range(1, 9)}
    evictable = EvictableBlocks(EVICTION["lru"], about.__getitem__)
    for block in about:
        evictable.add(block)
    for _ in range(1000):
        evictable.remove(3)
        evictable.add(3)
    assert len(evictable._heap) < 100
    assert len(evictable) == 8
