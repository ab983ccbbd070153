"""Checkpoints quantized on the way, and run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokenmill.compress.quantize import quantize
from tokenmill.errors import ConfigError, ModelError
from tokenmill.models.loader import load, load_weights
from tokenmill.quant.scheme import Scheme
from tokenmill.quant.weight import Quantized

INT8 = Scheme("int-quantized", 8, 0, True)
INT4 = Scheme("pack-quantized", 4, 32, False)
TOKENS = [[(7 * i + 3 * j) % 64 for i in range(40 + j)] for j in range(6)]
CONFIG = {
    "model_type": "qwen2",  # q, k and v with biases, and a head of its own
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}
LINEAR = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """In two files with an index, as large models are."""
    random = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (64, 64), "lm_head.weight": (64, 64), "model.norm.weight": (64,)}
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {f"{layer}{name}.weight": shape for name, shape in LINEAR.items()}
        shapes |= {f"{layer}self_attn.{part}_proj.bias": (size,) for part, size in (("q", 64), ("k", 32), ("v", 32))}
        shapes |= {f"{layer}{norm}_layernorm.weight": (64,) for norm in ("input", "post_attention")}
    tensors = {name: torch.randn(shape, generator=random).bfloat16() / 8 for name, shape in shapes.items()}
    folder = tmp_path / "model"
    folder.mkdir()
    files: dict[str, str] = {}
    for number, part in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part{number}.safetensors")
        files |= dict.fromkeys(part, f"part{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", [INT8, INT4], ids=str)
def test_linear_layers_are_rounded_and_all_else_stays(model: Path, tmp_path: Path, scheme: Scheme, method: str) -> None:
    out, before = tmp_path / "made" / "out", stored(model)
    outcome = quantize(model, out, scheme, method, TOKENS)
    spec, weights = load_weights(out)
    for name, weight in weights.items():
        assert isinstance(weight, Quantized) == (name.startswith("layers.") and len(weight.shape) == 2), name
    after = stored(out)
    rounded = {f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in LINEAR}
    for name in before.keys() - rounded:
        assert torch.equal(after[name], before[name]), name
    _, exact = load_weights(model)
    kept, original = weights["layers.1.mlp.gate_up"], exact["layers.1.mlp.gate_up"]
    assert isinstance(kept, Quantized)
    assert isinstance(original, torch.Tensor)
    assert (kept.dequantize() - original.float()).norm() < (0.02 if scheme.bits == 8 else 0.15) * original.norm()
    assert outcome.weights == sum(before[name].numel() for name in rounded)
    assert outcome.calibration_tokens == (sum(map(len, TOKENS)) if method == "gptq" else 0)
    assert outcome.bytes == sum(tensor.nbytes for tensor in after.values())
    assert scheme.bits < outcome.bits_per_weight < scheme.bits + 1.5
    hidden = torch.randn(3, spec.hidden_size).bfloat16()
    assert torch.equal(load(out).logits(hidden), load(model).logits(hidden))  # the head is the same


def test_a_file_holds_no_more_than_a_layer(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", INT4, "rtn", [])
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for index, file in enumerate(files[1:]):
        with safe_open(file, "pt") as opened:
            assert {name.split(".")[2] for name in opened.keys()} == {str(index)}  # noqa: SIM118 - no mapping
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored(tmp_path / "out").keys()


def test_files_beside_the_weights_are_copied(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(model, out, INT8, "rtn", [])
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_text() == (model / name).read_text()
    said = json.loads((out / "config.json").read_text())
    assert said.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert said == CONFIG
    assert not [file for file in out.iterdir() if file.name.startswith("part")]


def test_calibration_makes_up_for_errors(model: Path, tmp_path: Path) -> None:
    """The hidden states that come out of the layers are nearer to those of the original."""
    from tokenmill.compress.calibration import Calibration
    from tokenmill.models.decoder import plain_block

    def states(folder: Path) -> torch.Tensor:
        spec, weights = load_weights(folder)
        table = weights["embedding"]
        assert isinstance(table, torch.Tensor)
        calibration = Calibration(spec, [table[torch.tensor(ids)] for ids in TOKENS], lambda: None)
        for index, layer in enumerate(spec.layers):
            prefix = f"layers.{index}."
            own = {
                name.removeprefix(prefix): each.dequantize().bfloat16() if isinstance(each, Quantized) else each
                for name, each in weights.items()
                if name.startswith(prefix)
            }
            calibration.advance(layer, plain_block(layer, own, spec.norm_eps))
        return torch.cat(calibration.hidden).float()

    for method in ("rtn", "gptq"):
        quantize(model, tmp_path / method, INT4, method, TOKENS)
    exact, rtn, gptq = (states(folder) for folder in (model, tmp_path / "rtn", tmp_path / "gptq"))
    assert (gptq - exact).norm() < 0.9 * (rtn - exact).norm()


def test_progress_ends_at_its_total(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    quantize(model, tmp_path / "out", INT4, "gptq", TOKENS, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


def test_what_exists_is_not_written_over(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        quantize(model, tmp_path, INT8, "rtn", [])
    assert caught.value.code == "output_exists"


def test_groups_must_divide_the_inputs(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"96 inputs of 'layers.0.mlp.down'"):
        quantize(model, tmp_path / "out", Scheme("pack-quantized", 4, 64, False), "rtn", [])


def test_a_quantized_model_is_refused(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", INT8, "rtn", [])
    with pytest.raises(ModelError) as caught:
        quantize(tmp_path / "out", tmp_path / "again", INT4, "rtn", [])
    assert caught.value.code == "already_quantized"


@pytest.mark.parametrize("wrong", ["missing", "shape", "file"])
def test_nothing_is_left_of_a_checkpoint_that_does_not_match(model: Path, tmp_path: Path, wrong: str) -> None:
    file = model / "part1.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("_proj.weight"))
    if wrong == "file":
        file.unlink()
    else:
        replaced = {} if wrong == "missing" else {name: tensors[name][:-1].contiguous()}
        save_file({key: value for key, value in tensors.items() if key != name} | replaced, file)
    with pytest.raises(ModelError) as caught:
        quantize(model, tmp_path / "out", INT8, "rtn", [])
    assert caught.value.code == "checkpoint_mismatch"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
