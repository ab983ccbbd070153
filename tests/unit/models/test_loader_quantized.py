"""Loading with `quantize`, and loading checkpoints that are quantized already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenmill.errors import ConfigError, ModelError
from tokenmill.models import checkpoint, loader
from tokenmill.models.spec import is_norm, weight_bytes, weight_shapes
from tokenmill.quant.checkpoint import tensor_shapes
from tokenmill.quant.formats.int4 import FORMAT as INT4
from tokenmill.quant.scheme import Rounding, read_scheme
from tokenmill.quant.weight import Quantized, linear
from tokenmill.testing import random_model

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "dtype": "float32",
    "eos_token_id": 2,
}
W4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
LAYOUTS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "pack-quantized": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": W4}},
    },
    "int-quantized": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"weights": W4 | {"num_bits": 8, "symmetric": True, "strategy": "channel"}}},
    },
}  # fmt: skip
LAYER = "model.layers.0."
LINEAR = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}},
}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{LAYER}{name}.weight": shape for name, shape in LINEAR.items()}
    shapes |= {"model.embed_tokens.weight": (40, 64), "lm_head.weight": (40, 64)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norms = ("model.norm", LAYER + "input_layernorm", LAYER + "post_attention_layernorm")
    return found | {f"{name}.weight": torch.ones(64) for name in norms}


def quantized_tensors(but: str = "") -> dict[str, Tensor]:
    """The same with linear layers in 8 bits, one of them left as it was."""
    found = tensors()
    for name in LINEAR:
        if name != but:
            scale = found[f"{LAYER}{name}.weight"].abs().amax(1, keepdim=True) / 127
            found[f"{LAYER}{name}.weight"] = (found[f"{LAYER}{name}.weight"] / scale).round().char()
            found[f"{LAYER}{name}.weight_scale"] = scale
    return found


def write(folder: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_every_matrix_is_quantized_and_nothing_else(tmp_path: Path) -> None:
    spec, weights = loader.load_weights(write(tmp_path, tensors()), rounding=Rounding("int4"))
    assert weights.keys() == weight_shapes(spec).keys()
    for name, weight in weights.items():
        assert isinstance(weight, Quantized) == (not is_norm(name)), name
        assert tuple(weight.shape) == weight_shapes(spec)[name]


def test_joined_tensors_are_rounded_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever pieces they come."""
    monkeypatch.setattr(checkpoint, "_CHUNK", 5 * 64)
    stored = tensors()
    _, weights = loader.load_weights(write(tmp_path, stored), rounding=Rounding("int4"))
    qkv = torch.cat([stored[f"{LAYER}self_attn.{part}_proj.weight"] for part in "qkv"])
    found = weights["layers.0.attention.qkv"]
    assert isinstance(found, Quantized)
    assert torch.equal(found.dequantize(), INT4.quantize(qkv).dequantize())


def test_a_quantized_model_runs(tmp_path: Path) -> None:
    plain, rounded = (loader.load(write(tmp_path, tensors()), rounding=Rounding(each)) for each in ("none", "int8"))
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    exact, got = plain.logits(hidden), rounded.logits(hidden)
    assert not torch.equal(got, exact)
    assert (got - exact).norm() < 0.03 * exact.norm()


def test_int4_leaves_8_bits_to_embedding_and_head(tmp_path: Path) -> None:
    _, weights = loader.load_weights(write(tmp_path, tensors()), rounding=Rounding("int4"))
    kept = {name: weight for name, weight in weights.items() if isinstance(weight, Quantized)}
    assert {name for name, weight in kept.items() if weight.group == 0} == {"embedding", "head"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("block_size", [0, 16], ids=["plain", "native"])
@pytest.mark.parametrize(("head", "loss"), [("none", 0.003), ("int8", 0.01), ("int4", 0.08)])
def test_embedding_and_head_in_a_format_of_their_own(
    tmp_path: Path, head: str, loss: float, block_size: int, tied: bool
) -> None:
    """Rows of the one and products of the other are as close to the checkpoint's numbers as the format allows."""
    stored = tensors()
    table = stored["model.embed_tokens.weight"]
    matrix = table if tied else stored["lm_head.weight"]
    if tied:
        del stored["lm_head.weight"]
    folder = write(tmp_path, stored, dtype="bfloat16", head_dim=16, tie_word_embeddings=tied)
    model = loader.load(folder, rounding=Rounding("int8", head, "bf16"), block_size=block_size)
    ids, x = torch.tensor([3, 0, 39, 3]), torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert (model._embedding(ids).float() - table[ids]).norm() <= loss * table[ids].norm()
    exact = x.float() @ matrix.T
    lost = (model.logits(x) - exact).norm() / exact.norm()
    assert lost <= loss
    assert head != "int4" or lost > 0.03


@pytest.mark.parametrize("block_size", [0, 16], ids=["plain", "native"])
def test_a_quantized_checkpoint_computes_with_its_own_numbers(tmp_path: Path, block_size: int) -> None:
    """In every implementation: sums of whole numbers are exact, so only bfloat16 differs from the formula."""
    stored = quantized_tensors()
    head = stored["lm_head.weight"].clone()
    scale = head.abs().amax(1) / 127
    del stored["lm_head.weight"]
    stored["lm_head.weight"] = (head / scale[:, None]).round().char()
    stored["lm_head.weight_scale"] = scale[:, None].contiguous()
    folder = write(tmp_path, stored, quantization_config=W8A8, dtype="bfloat16", head_dim=16)
    model = loader.load(folder, block_size=block_size)
    if block_size and not model.native:
        pytest.skip("the native kernels are not built")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = linear(x.float(), Quantized(stored["lm_head.weight"], scale, 64))
    found = model.logits(x)
    assert torch.equal(found, exact if model.native else exact.bfloat16().float())


def test_packed_weights_take_no_more_than_their_bits(tmp_path: Path) -> None:
    """A table that is embedding and head is there once. Sizes are whole panels, so that nothing is filled up."""
    folder = random_model(tmp_path, vocab_size=288, hidden_size=64, intermediate_size=96)
    bf16, int8, int4 = (
        loader.load(folder, "bfloat16", rounding=Rounding(each), block_size=16) for each in ("none", "int8", "int4")
    )
    if not bf16.native:
        pytest.skip("the native kernels are not built")
    shapes = weight_shapes(bf16.spec)
    norms = sum(4 * torch.Size(shape).numel() for name, shape in shapes.items() if is_norm(name))
    matrices = {name: shape for name, shape in shapes.items() if not is_norm(name)}
    eight = {name: shape[0] * (shape[1] + 4) for name, shape in matrices.items()}
    four = {name: shape[0] * (shape[1] // 2 + 2 * shape[1] // 32 + 4) for name, shape in matrices.items()}
    assert bf16.weight_bytes == weight_bytes(bf16.spec, 2)
    assert int8.weight_bytes == norms + sum(eight.values())
    assert int4.weight_bytes == norms + sum((four | {"embedding": eight["embedding"]}).values())


def test_activations_of_every_quantized_weight(tmp_path: Path) -> None:
    """Of those that a checkpoint brings too."""
    folder = write(tmp_path, quantized_tensors(), quantization_config=W8A8)
    _, weights = loader.load_weights(folder, rounding=Rounding("int4", activations="bf16"))
    kept = {name: weight.activations for name, weight in weights.items() if isinstance(weight, Quantized)}
    assert set(kept.values()) == {"bf16"}
    assert {"embedding", "layers.0.mlp.down"} <= kept.keys()


def test_a_format_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loader.load_weights(write(tmp_path, tensors()), rounding=Rounding("int5"))
    assert caught.value.code == "unknown_choice"


def test_a_quantized_checkpoint_stays_as_it_is(tmp_path: Path) -> None:
    stored = quantized_tensors()
    folder = write(tmp_path, stored, quantization_config=W8A8)
    seen: list[tuple[int, int]] = []
    _, weights = loader.load_weights(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(tensor.nbytes for tensor in stored.values()),) * 2
    gate_up = weights["layers.0.mlp.gate_up"]
    assert isinstance(gate_up, Quantized)
    assert torch.equal(
        gate_up.whole(), torch.cat([stored[f"{LAYER}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    )
    assert isinstance(weights["embedding"], Tensor)
    _, rounded = loader.load_weights(folder, rounding=Rounding("int4"))
    assert isinstance(rounded["embedding"], Quantized)
    assert isinstance(down := rounded["layers.0.mlp.down"], Quantized)
    assert down.group == 0


@pytest.mark.parametrize("said", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_packed_with_its_own_numbers(tmp_path: Path, said: dict[str, Any]) -> None:
    scheme, generator = read_scheme(said), torch.Generator().manual_seed(3)
    stored = {name: weight for name, weight in tensors().items() if name.removeprefix(LAYER)[:-7] not in LINEAR}
    for name, shape in LINEAR.items():
        for part, size in tensor_shapes(scheme, shape).items():
            if "scale" in part:
                made = torch.rand(size, generator=generator).half() / 64 + 0.01
            elif part == "weight":
                made = torch.randint(-127, 128, size, generator=generator).char()
            else:
                made = torch.randint(-(2**31), 2**31, size, generator=generator).int()
            stored[f"{LAYER}{name}.{part}"] = made
    folder = write(tmp_path, stored, quantization_config=said, dtype="bfloat16", head_dim=16)
    _, weights = loader.load_weights(folder)
    model = loader.load(folder, block_size=16)
    if not model.native:
        pytest.skip("the native kernels are not built")
    layer = model._layers.layers[0]
    for name, packed in (("attention.out", layer.from_attention.projection), ("mlp.down", layer.from_mlp.projection)):
        read = weights[f"layers.0.{name}"]
        assert isinstance(read, Quantized)
        assert packed.format == ("int4" if scheme.bits == 4 else "int8")
        assert torch.equal(packed.dequantize(), read.dequantize())


def test_a_layer_that_the_checkpoint_leaves_alone(tmp_path: Path) -> None:
    folder = write(tmp_path, quantized_tensors("self_attn.o_proj"), quantization_config=W8A8)
    _, weights = loader.load_weights(folder)
    assert isinstance(weights["layers.0.attention.out"], Tensor)
    assert isinstance(weights["layers.0.mlp.down"], Quantized)


def test_joined_layers_must_be_stored_alike(tmp_path: Path) -> None:
    folder = write(tmp_path, quantized_tensors("self_attn.k_proj"), quantization_config=W8A8)
    with pytest.raises(ModelError, match="k_proj") as caught:
        loader.load_weights(folder)
    assert caught.value.code == "unsupported_model"


@pytest.mark.parametrize("wrong", ["missing", "shape", "leftover"])
def test_quantized_tensors_are_checked_like_others(tmp_path: Path, wrong: str) -> None:
    stored = quantized_tensors()
    name = f"{LAYER}mlp.up_proj.weight"
    if wrong == "missing":
        del stored[name]
    elif wrong == "shape":
        stored[name] = stored[name][:-1].contiguous()
    else:
        name = f"{LAYER}mlp.up_proj.weight_packed"
        stored[name] = torch.zeros(3)
    with pytest.raises(ModelError) as caught:
        loader.load_weights(write(tmp_path, stored, quantization_config=W8A8))
    assert (caught.value.code, caught.value.field) == ("checkpoint_mismatch", name)
