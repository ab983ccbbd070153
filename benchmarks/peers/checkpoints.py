"""The models in the forms that the peers read, all made from the same bf16 weights by rounding to nearest."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import places

GROUP = 128
"""Inputs that share a scale in the int4 checkpoints of vLLM and OpenVINO."""


def hugging_face(source: Path, tokenizer: Path, target: Path) -> None:
    """Links `source` into `target`, with the tokenizer of another folder.

    The random model's own tokenizer is one of bytes, without the merges that other programs ask for. Prompts are token
    ids, so it only has to load.
    """
    target.mkdir(parents=True, exist_ok=True)
    for folder, names in (
        (source, ("config.json", "generation_config.json", "model.safetensors")),
        (tokenizer, ("tokenizer.json", "tokenizer_config.json")),
    ):
        for name in names:
            (target / name).unlink(missing_ok=True)
            (target / name).symlink_to((folder / name).resolve())


def compressed_tensors(source: Path, target: Path, precision: str) -> None:
    """A checkpoint for vLLM: int8 weights per channel with dynamic int8 activations, or int4 weights in groups.

    Layout: compressed-tensors' `int-quantized` and `pack-quantized`. Embedding and head stay bf16, as in the
    checkpoints that vLLM's own tools make.
    """
    import torch
    from safetensors.torch import load_file, save_file

    stored: dict[str, Any] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        stem, rows, columns = name.removesuffix("weight"), *weight.shape
        if precision == "int8":
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            stored[name] = (weight.float() / scale).round().clamp(-128, 127).to(torch.int8)
        else:
            groups = weight.float().view(rows, columns // GROUP, GROUP)
            scale = groups.abs().amax(2, keepdim=True) / 7
            nibbles = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.int32).view(rows, columns // 8, 8)
            stored[stem + "weight_packed"] = sum(nibbles[:, :, index] << 4 * index for index in range(8)).to(
                torch.int32
            )
            stored[stem + "weight_shape"] = torch.tensor([rows, columns])
            scale = scale[..., 0]
        stored[stem + "weight_scale"] = scale.bfloat16()
    target.mkdir(parents=True, exist_ok=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target)
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _quantization_config(precision)
    (target / "config.json").write_text(json.dumps(config, indent=1))


def _quantization_config(precision: str) -> dict[str, Any]:
    weights = {"type": "int", "symmetric": True, "dynamic": False}
    if precision == "int8":
        weights |= {"num_bits": 8, "strategy": "channel"}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    else:
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
        inputs = None
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if precision == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


def openvino(python: Path, source: Path, target: Path, precision: str) -> None:
    """An OpenVINO export by optimum-intel; embedding and head in int8 where the layers are in int4."""
    options = {
        "bf16": ["fp16"],
        "int8": ["int8"],
        "int4": ["int4", "--group-size", str(GROUP), "--ratio", "1.0", "--sym"],
    }
    subprocess.run(
        [
            python.parent / "optimum-cli", "export", "openvino", "--model", source,
            "--task", "text-generation-with-past", "--weight-format", *options[precision], target,
        ],
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def gguf(llama_cpp: Path, tools: Path, source: Path, target: Path, base: Path) -> None:
    """A GGUF file for llama.cpp: `base` in bf16, converted if it is not there, and `target` quantized from it.

    Args:
        llama_cpp: llama.cpp's source, which has the converter.
        target: named by its type. Token embedding and head get the type of the layers.
    """
    if not base.exists():
        arguments = [source, "--outtype", "bf16", "--outfile", base]
        subprocess.run([sys.executable, __file__, llama_cpp, *arguments], check=True)
    if target != base:
        kind = target.stem
        subprocess.run(
            [tools / "llama-quantize", "--token-embedding-type", kind.removesuffix("_M"), base, target, kind],
            check=True,
        )


def _convert(llama_cpp: str, arguments: list[str]) -> None:
    """Runs llama.cpp's converter. It knows tokenizers by a checksum; ours is taken for Qwen2's.

    It would look for a SentencePiece model first, with a package that is not needed otherwise.
    """
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    from conversion import base

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    base.TextModel._set_vocab_sentencepiece = base.TextModel._set_vocab_gpt2
    script = f"{llama_cpp}/convert_hf_to_gguf.py"
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def make(root: Path, peer: str, model: str, precision: str, llama_cpp: Path) -> None:
    """Makes the peer's form of a model unless it is there or the peer has none."""
    target = places.model(root, model, peer, precision)
    source = places.hugging_face(root, model)
    if target is None or target == source or (target / "config.json").exists() or target.is_file():
        return
    print(f"making {target} ...", file=sys.stderr)
    if peer == "vllm":
        compressed_tensors(source, target, precision)
    elif peer == "openvino":
        openvino(places.python(root, peer), source, target, precision)
    elif peer == "llamacpp":
        gguf(llama_cpp, places.tools(root), source, target, target.with_name("bf16.gguf"))


if __name__ == "__main__":
    _convert(sys.argv[1], sys.argv[2:])
