from __future__ import annotations

from dataclasses import replace

import torch

from tokenmill.kernels import whole_kv
from tokenmill.models.batch import KVCache
from tokenmill.models.spec import KV_SCALE_BYTES, KVGroup, KVLayout

LAYOUT = KVLayout((KVGroup(8, (0, 1)), KVGroup(8, (3,)), KVGroup(None, (2, 4))), 4, 2 * 2 * 4 * 3 * 5 * 4, 3, 5, 2)


def cache() -> KVCache:
    made = KVCache(LAYOUT, 7, torch.float32, torch.device("cpu"))
    for number, tensor in enumerate((*made.keys, *made.values)):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1000 * number)
    return made


def test_the_buffers_have_the_bytes_of_the_layout() -> None:
    made = KVCache(LAYOUT, 7, torch.float32, torch.device("cpu"))
    assert sum(tensor.nbytes for tensor in (*made.keys, *made.values)) == 7 * LAYOUT.block_bytes
    assert all(tensor.shape == (7, 3, 4, 5) and not tensor.any() for tensor in (*made.keys, *made.values))


def test_a_quantized_cache_holds_int8_and_a_scale_for_every_row() -> None:
    assert whole_kv.SCALE_BYTES == KV_SCALE_BYTES
    made = KVCache(
        replace(LAYOUT, block_bytes=2 * 2 * 4 * 3 * 9, quantized=True), 7, torch.float32, torch.device("cpu")
    )
    assert all(tensor.dtype == torch.int8 and tensor.shape == (7, 3, 4, 9) for tensor in (*made.keys, *made.values))
    assert sum(tensor.nbytes for tensor in (*made.keys, *made.values)) == 7 * 2 * 2 * 4 * 3 * 9


def test_layers_of_a_group_have_buffers_of_their_own_and_groups_share_them() -> None:
    made = cache()
    assert [made.layer(index)[2] for index in range(5)] == [0, 0, 2, 1, 2]
    for index, buffer in enumerate((0, 1, 0, 0, 1)):
        keys, values, _ = made.layer(index)
        assert keys is made.keys[buffer]
        assert values is made.values[buffer]


def test_copies_whole_blocks_in_every_buffer_and_nothing_else() -> None:
    before, after = cache(), cache()
    after.copy_blocks([(1, 4), (2, 5), (1, 0)])
    source = [1, 1, 2, 3, 1, 2, 6]
    for old, new in zip((*before.keys, *before.values), (*after.keys, *after.values), strict=True):
        assert torch.equal(new, old[source])


def test_no_copies_change_nothing() -> None:
    before, after = cache(), cache()
    after.copy_blocks([])
    assert torch.equal(before.keys[0], after.keys[0])


def test_a_copy_sees_what_the_copies_before_it_wrote() -> None:
    before, after = cache(), cache()
    after.copy_blocks([(1, 4), (4, 5), (2, 4), (4, 6)])
    source = [0, 1, 2, 3, 2, 1, 2]
    for old, new in zip((*before.keys, *before.values), (*after.keys, *after.values), strict=True):
        assert torch.equal(new, old[source])
