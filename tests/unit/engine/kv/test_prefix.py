from hypothesis import given
from hypothesis import strategies as st

from tokenmill.engine.kv.prefix import Fingerprint, MissLog, block_digest, root_digest

tokens = st.lists(st.integers(0, 50), max_size=40)


@given(tokens, tokens, st.integers(1, 8))
def test_equal_digests_mean_an_equal_beginning(first, second, block_size):
    prints = []
    for ids in (first, second):
        fingerprint = Fingerprint(block_size)
        fingerprint.extend(ids)
        prints.append(fingerprint.digests)
    for index, (one, other) in enumerate(zip(*prints, strict=False)):
        end = (index + 1) * block_size
        assert (one == other) == (first[:end] == second[:end])


@given(tokens, st.integers(1, 8), st.lists(st.integers(1, 40), max_size=5))
def test_growing_in_pieces_gives_the_same_digests(ids, block_size, cuts):
    whole, grown = Fingerprint(block_size), Fingerprint(block_size)
    whole.extend(ids)
    for cut in sorted(cuts):
        grown.extend(ids[:cut])
    grown.extend(ids)
    assert grown.digests == whole.digests
    assert len(whole.digests) == len(ids) // block_size


def test_salt_and_adapter_separate_equal_text_and_the_plain_chain_does_not():
    prints = [Fingerprint(2), Fingerprint(2, salt="a"), Fingerprint(2, salt="b"), Fingerprint(2, adapter="a")]
    for fingerprint in prints:
        fingerprint.extend([1, 2, 3, 4])
    assert len({fingerprint.digests[1] for fingerprint in prints}) == 4
    assert len({fingerprint.plain[1] for fingerprint in prints}) == 1


def test_extra_keys_cannot_be_shifted_into_one_another():
    assert root_digest(["ab", "c"]) != root_digest(["a", "bc"])
    assert root_digest(["", ""]) == b""


def test_the_digest_depends_on_the_parent():
    assert block_digest(b"", [1, 2]) != block_digest(b"x", [1, 2])


def test_misses_are_explained():
    log = MissLog(10)
    me = ("", "")
    assert log.reason(b"d", b"p", me) == "cold"
    log.owned(b"p", ("other", ""))
    assert log.reason(b"d", b"p", me) == "salt"
    log.owned(b"p", ("", "lora"))
    assert log.reason(b"d", b"p", me) == "adapter"
    log.gone(b"d", "evicted")
    assert log.reason(b"d", b"p", me) == "evicted"


def test_the_miss_log_is_bounded():
    log = MissLog(3)
    for index in range(10):
        log.gone(bytes([index]), "evicted")
    assert log.reason(bytes([0]), b"", ("", "")) == "cold"
    assert log.reason(bytes([9]), b"", ("", "")) == "evicted"
