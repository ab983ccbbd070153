from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenmill.errors import MissingDependencyError, ModelError
from tokenmill.models import folder as folders
from tokenmill.models import loader
from tokenmill.models.config import ModelConfig

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "dtype": "float32",
    "eos_token_id": 2,
}
FIRST = "model.layers.0."


def tensors() -> dict[str, Tensor]:
    shapes = {
        "self_attn.q_proj.weight": (8, 8),
        "self_attn.k_proj.weight": (4, 8),
        "self_attn.v_proj.weight": (4, 8),
        "self_attn.o_proj.weight": (8, 8),
        "mlp.gate_proj.weight": (12, 8),
        "mlp.up_proj.weight": (12, 8),
        "mlp.down_proj.weight": (8, 12),
        "input_layernorm.weight": (8,),
        "post_attention_layernorm.weight": (8,),
    }
    found = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    found |= {"model.embed_tokens.weight": (11, 8), "lm_head.weight": (11, 8), "model.norm.weight": (8,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in found.items()}


def write(folder: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, tensors())


def refusal(path: Path, **arguments: Any) -> tuple[str, str | None, str]:
    with pytest.raises(ModelError) as caught:
        loader.load(path, **arguments)
    return caught.value.code, caught.value.field, caught.value.message


def test_loads_in_the_checkpoints_type_or_the_one_asked_for(folder: Path) -> None:
    assert loader.load(folder).dtype == torch.float32
    assert loader.load(folder, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("said", "meant"),
    [({"dtype": "bfloat16"}, "bfloat16"), ({"dtype": None, "torch_dtype": "float16"}, "bfloat16"), ({}, "float32")],
)
def test_auto_is_the_checkpoints_type(tmp_path: Path, said: dict[str, Any], meant: str) -> None:
    write(tmp_path, {}, **said)
    assert folders.resolve_dtype(folders.read_config(tmp_path), "auto") == meant
    assert folders.resolve_dtype(folders.read_config(tmp_path), "float32") == "float32"
    assert (loader.dtype_bytes("float32"), loader.dtype_bytes("bfloat16")) == (4, 2)


def test_progress_ends_at_the_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    loader.load(folder, progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors().values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {of for _, of in seen} == {total}
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("name", sorted(tensors()))
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    weights = tensors()
    del weights[name]
    assert refusal(write(tmp_path, weights))[:2] == ("checkpoint_mismatch", name)


@pytest.mark.parametrize(
    "name", ["model.extra.weight", FIRST + "self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight"]
)
def test_a_leftover_tensor_is_named(tmp_path: Path, name: str) -> None:
    assert refusal(write(tmp_path, tensors() | {name: torch.zeros(8)}))[:2] == ("checkpoint_mismatch", name)


@pytest.mark.parametrize("name", ["lm_head.weight", FIRST + "self_attn.k_proj.weight", "model.norm.weight"])
def test_a_tensor_of_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path, name: str) -> None:
    weights = tensors()
    right = list(weights[name].shape)
    weights[name] = torch.zeros(right[0] + 1, *right[1:])
    code, field, message = refusal(write(tmp_path, weights))
    assert (code, field) == ("checkpoint_mismatch", name)
    assert str(right) in message
    assert str(list(weights[name].shape)) in message


def test_mismatches_are_found_before_any_weight_is_read(tmp_path: Path) -> None:
    weights = tensors() | {"model.extra.weight": torch.zeros(1)}
    called: list[int] = []
    refusal(write(tmp_path, weights), progress=lambda done, _total: called.append(done))
    assert called == []


def test_a_tied_head_needs_no_tensor_and_a_stored_copy_is_ignored(tmp_path: Path) -> None:
    weights = tensors()
    hidden = torch.randn(3, 8)
    with_copy = loader.load(write(tmp_path, weights, tie_word_embeddings=True))
    logits = with_copy.logits(hidden)
    torch.testing.assert_close(logits, hidden @ weights["model.embed_tokens.weight"].T)
    del weights["lm_head.weight"]
    assert torch.equal(loader.load(write(tmp_path, weights, tie_word_embeddings=True)).logits(hidden), logits)


def test_an_untied_head_is_used(folder: Path) -> None:
    hidden = torch.randn(3, 8)
    torch.testing.assert_close(loader.load(folder).logits(hidden), hidden @ tensors()["lm_head.weight"].T)


def test_stored_rotary_frequencies_of_early_checkpoints_are_ignored(tmp_path: Path) -> None:
    extra = {FIRST + "self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    assert loader.load(write(tmp_path, tensors() | extra)).spec.model_type == "llama"


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(folder)[:2] == ("checkpoint_mismatch", "model-00002-of-00002.safetensors")


def test_an_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    code, field, message = refusal(write(tmp_path, {}, model_type="zebra"))
    assert (code, field) == ("unsupported_model", "model_type")
    assert "llama" in message
    assert "olmo2" in message


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {}, quantization_config={"quant_method": "gptq"})
    assert refusal(tmp_path)[:2] == ("unsupported_model", "quantization_config")


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    assert refusal(tmp_path)[:2] == ("model_not_found", "model")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_malformed_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert refusal(tmp_path)[:2] == ("checkpoint_mismatch", "config.json")


def test_a_shorter_limit_is_the_models_longest_sequence(folder: Path) -> None:
    assert folders.read_spec(folder).max_position == 32
    assert folders.read_spec(folder, 16).max_position == 16
    assert folders.read_spec(folder, 64).max_position == 32
    assert loader.load(folder, max_model_len=16).spec == folders.read_spec(folder, 16)


def test_the_end_of_text_comes_from_the_generation_configuration_first(folder: Path) -> None:
    assert folders.read_generation(folder) == folders.Generation((2,), {})
    said = {"eos_token_id": [4, 5], "do_sample": True, "temperature": 0.6, "top_p": None, "max_length": 9}
    (folder / "generation_config.json").write_text(json.dumps(said))
    assert folders.read_generation(folder) == folders.Generation((4, 5), {"temperature": 0.6})
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": False}))
    assert folders.read_generation(folder) == folders.Generation((2,), {})


def test_a_model_without_an_end_of_text(tmp_path: Path) -> None:
    assert folders.read_generation(write(tmp_path, {}, eos_token_id=None)).eos_ids == ()


def test_resolve_takes_folders_as_they_are(tmp_path: Path) -> None:
    assert folders.resolve(str(tmp_path)) == tmp_path
    assert folders.resolve("demo").parts[-2:] == ("demo", "checkpoint")


@pytest.mark.parametrize("model", ["./nothing/here", "/no/such/folder", "nothing", "a/b/c"])
def test_resolve_does_not_take_a_mistyped_folder_for_a_hub_id(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError) as caught:
        folders.resolve(model)
    assert caught.value.code == "model_not_found"


def test_resolve_asks_the_hub_for_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda model, **_: str(tmp_path / model))
    assert folders.resolve("someone/model-1.0") == tmp_path / "someone" / "model-1.0"


@pytest.mark.parametrize("error", [OSError("offline"), ValueError("no such name"), Exception("no such revision")])
def test_a_hub_that_fails_is_a_model_not_found(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fail(_model: str, **_: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=str(error)) as caught:
        folders.resolve("someone/model")
    assert caught.value.code == "model_not_found"


def test_offline_never_reaches_for_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        folders.resolve("someone/model-that-is-not-cached")
    assert caught.value.code == "model_not_found"


def test_without_the_hubs_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="tokenmill\\[hf\\]"):
        folders.resolve("someone/model")


def test_options_default_to_the_built_in_model() -> None:
    config = ModelConfig()
    assert (config.model, config.dtype, config.device) == ("demo", "auto", "auto")
    assert (config.max_model_len, config.threads) == (0, 0)
