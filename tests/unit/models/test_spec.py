from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.errors import ModelError
from tokenmill.models.family import FAMILIES
from tokenmill.models.rope import RopeSpec
from tokenmill.models.spec import (
    MAX_TOKENS,
    AttentionSpec,
    KVGroup,
    KVLayout,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    flops_per_token,
    kv_bytes_per_token,
    kv_layout,
    parameters,
    pool_blocks,
    weight_bytes,
    weight_shapes,
)


def published(model_type: str, vocab: int, hidden: int, mlp: int, layers: int, heads: int, **more: Any) -> ModelSpec:
    config = {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 4096,
    }
    return FAMILIES.get(model_type).spec(config | more)


LLAMA_2_7B = published("llama", 32000, 4096, 11008, 32, 32)
LLAMA_31_8B = published("llama", 128256, 4096, 14336, 32, 32, num_key_value_heads=8)
MISTRAL_7B = published("mistral", 32000, 4096, 14336, 32, 32, num_key_value_heads=8)
QWEN25_05B = published("qwen2", 151936, 896, 4864, 24, 14, num_key_value_heads=2, tie_word_embeddings=True)
QWEN3_06B = published("qwen3", 151936, 1024, 3072, 28, 16, num_key_value_heads=8, tie_word_embeddings=True)
PHI3_MINI = published("phi3", 32064, 3072, 8192, 32, 32)
GEMMA2_2B = published("gemma2", 256000, 2304, 9216, 26, 8, num_key_value_heads=4)
GEMMA3_1B = published("gemma3_text", 262144, 1152, 6912, 26, 4, num_key_value_heads=1, sliding_window=512)
OLMO2_7B = published("olmo2", 100352, 4096, 11008, 32, 32)


@pytest.mark.parametrize(
    ("spec", "count", "kv_bytes"),
    [
        (LLAMA_2_7B, 6_738_415_616, 524_288),
        (LLAMA_31_8B, 8_030_261_248, 131_072),
        (MISTRAL_7B, 7_241_732_096, 131_072),
        (QWEN25_05B, 494_032_768, 12_288),
        (QWEN3_06B, 596_049_920, 114_688),
        (PHI3_MINI, 3_821_079_552, 393_216),
        (GEMMA2_2B, 2_614_341_888, 106_496),
        (GEMMA3_1B, 999_885_952, 26_624),
        (OLMO2_7B, 7_298_617_344, 524_288),
    ],
    ids=lambda value: value.model_type if isinstance(value, ModelSpec) else None,
)
def test_published_models_have_their_published_size(spec: ModelSpec, count: int, kv_bytes: int) -> None:
    assert parameters(spec) == count
    assert kv_bytes_per_token(spec, 2) == kv_bytes


def test_quantized_keys_and_values_are_a_byte_per_element_and_a_scale_per_head() -> None:
    heads = 28 * 2 * 8
    assert kv_bytes_per_token(QWEN3_06B, 2, quantized=True) == heads * (128 + 4)
    assert kv_bytes_per_token(QWEN3_06B, 4, quantized=True) == heads * (128 + 4)
    layout = kv_layout(QWEN3_06B, 16, 2, quantized=True)
    assert layout.quantized
    assert layout.block_bytes == 16 * heads * (128 + 4)


def test_weights_take_two_bytes_each_and_norms_four() -> None:
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    assert weight_bytes(QWEN3_06B, 2) == 2 * 596_049_920 + 2 * norms
    assert weight_bytes(QWEN3_06B, 4) == 4 * 596_049_920


def test_a_tied_head_is_no_tensor_of_its_own() -> None:
    untied = replace(QWEN3_06B, tied_head=False)
    assert set(weight_shapes(untied)) - set(weight_shapes(QWEN3_06B)) == {"head"}
    assert parameters(untied) - parameters(QWEN3_06B) == 151936 * 1024


def test_flops_are_two_per_weight_and_grow_with_the_visible_context() -> None:
    linear = 2 * (6_738_415_616 - 32000 * 4096 - (2 * 32 + 1) * 4096)
    assert flops_per_token(LLAMA_2_7B, 1) == linear + 32 * 4 * 4096
    assert flops_per_token(LLAMA_2_7B, 1000) == linear + 1000 * 32 * 4 * 4096
    # Beyond its window of 4096 tokens a longer context costs Mistral nothing.
    assert flops_per_token(MISTRAL_7B, 5000) == flops_per_token(MISTRAL_7B, 4096) > flops_per_token(MISTRAL_7B, 4095)


def test_a_tied_head_costs_as_many_flops() -> None:
    assert flops_per_token(QWEN3_06B, 1) == flops_per_token(replace(QWEN3_06B, tied_head=False), 1)


def test_a_uniform_model_has_one_group_and_its_blocks_cost_what_its_tokens_cost() -> None:
    layout = kv_layout(LLAMA_31_8B, 16, 2)
    assert layout.groups == (KVGroup(None, tuple(range(32))),)
    assert layout.buffers == 32
    assert layout.block_bytes == 16 * 131_072
    assert pool_blocks(layout, 2**30) == 512
    assert pool_blocks(layout, -1) == 0


def test_layers_of_two_kinds_share_one_pool() -> None:
    layout = kv_layout(GEMMA3_1B, 16, 2)
    assert layout.buffers == 4
    assert layout.block_bytes == 4 * 2 * 16 * 256 * 2
    assert [group.window for group in layout.groups].count(512) == 6
    assert [group.layers for group in layout.groups if group.window is None] == [(5, 11, 17, 23)]
    assert sorted(layer for group in layout.groups for layer in group.layers) == list(range(26))
    assert all(len(group.layers) <= layout.buffers for group in layout.groups)


def test_layers_with_different_heads_are_refused() -> None:
    odd = replace(LLAMA_2_7B.layers[0], attention=replace(LLAMA_2_7B.layers[0].attention, kv_heads=8))
    with pytest.raises(ModelError) as caught:
        kv_layout(replace(LLAMA_2_7B, layers=(*LLAMA_2_7B.layers, odd)), 16, 2)
    assert caught.value.code == "unsupported_model"


@st.composite
def layouts(draw: st.DrawFn) -> KVLayout:
    windows = draw(st.lists(st.none() | st.integers(1, 50), min_size=1, max_size=6))
    attention = AttentionSpec(2, 1, 4, 0.5, RopeSpec(1e4, 4))
    layers = tuple(LayerSpec(replace(attention, window=window), MlpSpec(8)) for window in windows)
    return kv_layout(ModelSpec("any", 10, 8, layers, 1e-6, 64, False), draw(st.integers(1, 9)), 4)


@given(layouts(), st.integers(1, 200), st.integers(1, 40))
def test_no_sequence_ever_holds_more_than_blocks_for(layout: KVLayout, tokens: int, chunk: int) -> None:
    """A sequence is computed chunk by chunk; before each step, blocks that no query sees are given back."""
    size, most = layout.block_size, 0
    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        held = 0
        for group in layout.groups:
            first = 0 if group.window is None else max(0, start - group.window + 1)
            held += (end - 1) // size - first // size + 1
        most = max(most, held)
    assert most <= layout.blocks_for(tokens, chunk)


@given(layouts(), st.integers(0, 300), st.integers(1, 40))
def test_capacity_is_the_longest_that_fits(layout: KVLayout, blocks: int, chunk: int) -> None:
    longest = layout.capacity(blocks, chunk)
    assert layout.blocks_for(longest, chunk) <= blocks
    assert longest == MAX_TOKENS or layout.blocks_for(longest + 1, chunk) > blocks


def test_windows_bound_the_blocks_of_a_long_sequence() -> None:
    layout = kv_layout(MISTRAL_7B, 16, 2)
    assert layout.blocks_for(4096, 16) == 256
    assert layout.blocks_for(10**6, 16) == 258  # 4095 + 16 tokens, rounded up, and one for a crooked start
    assert layout.capacity(258, 16) == MAX_TOKENS
    assert layout.capacity(100, 16) == 1600
