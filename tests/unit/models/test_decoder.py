from __future__ import annotations

import pytest
import torch

from tokenmill.models.batch import ForwardBatch
from tokenmill.models.decoder import Decoder
from tokenmill.models.rope import RopeSpec
from tokenmill.models.spec import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    is_norm,
    kv_layout,
    weight_bytes,
    weight_shapes,
)

ATTENTION = AttentionSpec(heads=2, kv_heads=1, head_dim=4, scale=0.5, rope=RopeSpec(100.0, 4))
SPEC = ModelSpec("any", 10, 8, (LayerSpec(ATTENTION, MlpSpec(6)),) * 2, 1e-6, 64, tied_head=True, logit_softcap=1.5)


def decoder(dtype: torch.dtype) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    return Decoder(
        SPEC,
        {
            name: torch.randn(shape, generator=generator).to(torch.float32 if is_norm(name) else dtype)
            for name, shape in weight_shapes(SPEC).items()
        },
        dtype,
    )


def batch(tokens: list[int], start: int = 0) -> ForwardBatch:
    positions = torch.arange(start, start + len(tokens))
    return ForwardBatch(
        torch.tensor(tokens),
        positions,
        (positions + 4,),  # block 0 stays unused
        (torch.tensor([[1, 2, 3]], dtype=torch.int32),),
        torch.tensor([0, len(tokens)], dtype=torch.int32),
        torch.tensor([start + len(tokens)], dtype=torch.int32),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_take_the_memory_that_is_foretold(dtype: torch.dtype) -> None:
    assert decoder(dtype).weight_bytes == weight_bytes(SPEC, dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_and_shapes(dtype: torch.dtype) -> None:
    model = decoder(dtype)
    cache = model.new_cache(kv_layout(SPEC, 4, dtype.itemsize), 5)
    hidden = model.forward(batch([1, 2, 3]), cache)
    assert (hidden.shape, hidden.dtype) == ((3, 8), dtype)
    logits = model.logits(hidden)
    assert (logits.shape, logits.dtype) == ((3, 10), torch.float32)
    assert {tensor.dtype for tensor in (*cache.keys, *cache.values)} == {dtype}


def test_logits_stay_within_their_cap() -> None:
    logits = decoder(torch.float32).logits(torch.full((1, 8), 1e3))
    assert logits.abs().max() == 1.5


def test_a_pass_writes_its_own_tokens_into_the_cache_and_no_others() -> None:
    model = decoder(torch.float32)
    cache = model.new_cache(kv_layout(SPEC, 4, 4), 5)
    model.forward(batch([1, 2, 3]), cache)
    for tensor in (*cache.keys, *cache.values):
        assert tensor[1, :, :3].abs().amin(dim=-1).gt(0).all()
        tensor[1, :, :3] = 0
        assert not tensor.any()


def test_the_batch_and_the_weights_are_not_changed() -> None:
    model = decoder(torch.float32)
    cache = model.new_cache(kv_layout(SPEC, 4, 4), 5)
    work = batch([1, 2, 3])
    first = model.forward(work, cache)
    assert work.token_ids.tolist() == [1, 2, 3]
    assert work.positions.tolist() == [0, 1, 2]
    assert torch.equal(model.forward(work, cache), first)
