"""The native layers against the plain ones: every kind of block, in bfloat16, within the rounding of that type."""

import dataclasses

import pytest
import torch

from tokenmill.models.batch import ForwardBatch
from tokenmill.models.decoder import Decoder, usable
from tokenmill.models.rope import RopeSpec
from tokenmill.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, is_norm, kv_layout, weight_shapes

ROPE = RopeSpec(10000.0, 32)
PLAIN = AttentionSpec(heads=6, kv_heads=2, head_dim=32, scale=32**-0.5, rope=ROPE)
MLP = MlpSpec(intermediate=72)

LAYERS = {
    "plain": LayerSpec(PLAIN, MLP),
    "head norms": LayerSpec(dataclasses.replace(PLAIN, norm="per_head"), MLP),
    "biases": LayerSpec(dataclasses.replace(PLAIN, qkv_bias=True, out_bias=True), dataclasses.replace(MLP, bias=True)),
    "partial rotation": LayerSpec(dataclasses.replace(PLAIN, rope=RopeSpec(10000.0, 16)), MLP),
    "window": LayerSpec(dataclasses.replace(PLAIN, window=20), MLP),
    "sandwich, caps, gelu": LayerSpec(
        dataclasses.replace(PLAIN, softcap=5.0), dataclasses.replace(MLP, activation="gelu_tanh"), "sandwich_norm"
    ),
    "post norm, whole norms": LayerSpec(dataclasses.replace(PLAIN, norm="whole"), MLP, "post_norm"),
}


def weights(spec: ModelSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, shape in weight_shapes(spec).items():
        values = torch.randn(shape, generator=generator)
        if is_norm(name):
            made[name] = 1 + 0.2 * values
        else:
            made[name] = (values * (0.3 if len(shape) == 1 else shape[1] ** -0.5)).to(torch.bfloat16).to(dtype)
    return made


def native_weights(plain: dict[str, torch.Tensor], quantize: str = "none") -> dict:
    from tokenmill.models.native import packed

    return {
        name: packed(name, weight, plain.get(f"{name}_bias"), quantize, "int8") if weight.dim() == 2 else weight
        for name, weight in plain.items()
    }


def batch(layout, rows: list[tuple[int, int]], first_block: list[int]) -> ForwardBatch:
    """`rows` of (start, end); row r keeps its sequence in blocks from first_block[r] on, the same in every group."""
    size = layout.block_size
    positions = torch.cat([torch.arange(start, end) for start, end in rows])
    blocks = max(-(-end // size) for _, end in rows)
    table = torch.tensor([[first + index for index in range(blocks)] for first in first_block])
    row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([end - start for start, end in rows]))
    slots = table[row, positions // size] * size + positions % size
    return ForwardBatch(
        token_ids=(positions * 7 + row * 13) % 50,
        positions=positions,
        slots=(slots,) * len(layout.groups),
        block_tables=(table.int(),) * len(layout.groups),
        query_start=torch.tensor([0, *torch.tensor([end - start for start, end in rows]).cumsum(0)], dtype=torch.int32),
        context_lens=torch.tensor([end for _, end in rows], dtype=torch.int32),
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_native_layers_compute_what_the_plain_ones_do(kind):
    layer = LAYERS[kind]
    spec = ModelSpec("test", 50, 64, (layer, layer), 1e-6, 256, tied_head=True, logit_softcap=None)
    if not usable(spec, torch.bfloat16, torch.device("cpu"), 16):
        pytest.skip("the native kernels are not built")
    exact = Decoder(spec, weights(spec, torch.float32), torch.float32)
    plain = Decoder(spec, weights(spec, torch.bfloat16), torch.bfloat16)
    native = Decoder(spec, native_weights(weights(spec, torch.bfloat16)), torch.bfloat16, native=True)
    results = []
    for decoder in (exact, plain, native):
        layout = kv_layout(spec, 16, decoder.dtype.itemsize)
        cache = decoder.new_cache(layout, 24)
        steps = [[(0, 37), (0, 5), (0, 90)], [(37, 38), (5, 30), (90, 91)]]
        hidden = [decoder.forward(batch(layout, rows, [1, 6, 12]), cache) for rows in steps]
        results.append(decoder.logits(torch.cat(hidden)))
    truth, plain_error = results[0], (results[1] - results[0]).square().mean().sqrt()
    native_error = (results[2] - truth).square().mean().sqrt()
    assert native_error < 1.5 * plain_error + 1e-4, (native_error, plain_error)
