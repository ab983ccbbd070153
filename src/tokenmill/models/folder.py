"""From a name to a folder in Hugging Face layout, and what its JSON files say. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenmill.errors import ConfigError, MissingDependencyError, ModelError, did_you_mean
from tokenmill.models.family import FAMILIES, Config, Family, unsupported
from tokenmill.models.spec import ModelSpec
from tokenmill.types import PoolingParams

__all__ = [
    "Generation",
    "family_of",
    "read_config",
    "read_generation",
    "read_json",
    "read_pooling",
    "read_spec",
    "resolve",
    "resolve_dtype",
]

DEMO = Path(__file__).parent / "demo" / "checkpoint"
_FILES = ["*.json", "*.safetensors", "*.jinja"]


def resolve(model: str) -> Path:
    """The folder of a model.

    Args:
        model: ``demo`` for the built-in one, a folder, or a Hugging Face id, which is downloaded unless it is in the
            local cache; ``HF_HUB_OFFLINE=1`` forbids the download.

    Raises:
        ModelError: ``model_not_found``.
        MissingDependencyError: a hub id is given and huggingface_hub is not installed.
    """
    if model == "demo":
        return DEMO
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith(("./", "../")):
        raise ModelError("model_not_found", f"There is no model folder {model!r}.", "model")
    try:
        import huggingface_hub
    except ImportError:
        raise MissingDependencyError("huggingface_hub", f"Fetching {model!r}", "hf") from None
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_FILES))
    except Exception as error:  # errors of hub and network share no base; each means that the model cannot be had
        raise ModelError(
            "model_not_found", f"There is no folder {model!r}, and the hub did not give it: {error}", "model"
        ) from error


def read_spec(path: Path, max_model_len: int = 0) -> ModelSpec:
    """What the model in folder `path` is, from its ``config.json``. Reads no weights.

    Args:
        max_model_len: the longest sequence that will be computed, if less than the model's own; longrope picks its
            frequencies by it.

    Raises:
        ModelError: ``model_not_found`` without a readable config.json, ``unsupported_model`` for an unknown family or a
            feature that does not exist here, ``checkpoint_mismatch`` for a configuration that lacks something.
    """
    config = read_config(path)
    spec = family_of(config).spec(config)
    return replace(spec, max_position=min(max_model_len, spec.max_position)) if max_model_len else spec


def read_config(path: Path) -> Config:
    """The content of ``config.json``; see `read_spec` for the errors."""
    config = read_json(path / "config.json")
    if config is None:
        raise ModelError("model_not_found", f"{path} is not a model folder: it has no config.json.", "model")
    return config


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None without the file; ModelError ``checkpoint_mismatch`` for anything else."""
    content = _read(file)
    if content is not None and not isinstance(content, dict):
        raise ModelError("checkpoint_mismatch", f"{file} does not hold a JSON object.", file.name)
    return content


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ModelError("checkpoint_mismatch", f"{file} is not valid JSON: {error}.", file.name) from None


def family_of(config: Config) -> Family:
    """The family that a configuration names; ModelError ``unsupported_model`` if there is none."""
    model_type = str(config.get("model_type", ""))
    if config.get("quantization_config"):
        raise unsupported("its weights are quantized", "quantization_config")
    try:
        return FAMILIES.get(model_type)
    except ConfigError as error:
        if error.code != "unknown_choice":
            raise
        known = did_you_mean(model_type, FAMILIES.names())
        raise unsupported(f"there is no model family {model_type!r}. {known}", "model_type") from None


@dataclass(frozen=True)
class Generation:
    """What the model's makers recommend for generating."""

    eos_ids: tuple[int, ...] = ()
    """Tokens that end a text."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Values for fields of `SamplingParams`; empty when the makers sample greedily or say nothing."""


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_generation(path: Path) -> Generation:
    """Reads ``generation_config.json``, and the end-of-text tokens from ``config.json`` if it names none.

    Raises:
        ModelError: ``model_not_found`` without config.json, ``checkpoint_mismatch`` for malformed JSON.
    """
    said = read_json(path / "generation_config.json") or {}
    eos = said.get("eos_token_id")
    if eos is None:
        eos = read_config(path).get("eos_token_id")
    ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    sampling = {key: said[key] for key in _SAMPLING if said.get(key) is not None} if said.get("do_sample") else {}
    return Generation(ids, sampling)


_POOLINGS = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}


def read_pooling(path: Path) -> PoolingParams:
    """How the model's makers get an embedding, from the files that sentence-transformers writes: ``modules.json`` and
    the ``config.json`` of its pooling module. Without them the normalized state of the last token.

    Source: https://github.com/UKPLab/sentence-transformers/blob/master/sentence_transformers/models/Pooling.py

    Raises:
        ModelError: ``unsupported_model`` for a way that does not exist here, ``checkpoint_mismatch`` for malformed
            files.
    """
    modules = _read(path / "modules.json")
    if modules is None:
        return PoolingParams()
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError("checkpoint_mismatch", f"{path / 'modules.json'} does not hold a list of objects.")
    places = {str(module.get("type")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
    if unknown := places.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise unsupported(f"its embeddings need a module {min(unknown)!r}", "modules.json")
    said = read_json(path / places["Pooling"] / "config.json") if "Pooling" in places else None
    modes = [name for name, value in (said or {}).items() if name.startswith("pooling_mode_") and value]
    if said is not None and (len(modes) != 1 or modes[0] not in _POOLINGS):
        raise unsupported(f"its pooling {modes} is neither the last token nor the mean", "pooling")
    return PoolingParams(pooling=_POOLINGS[modes[0]] if modes else "last", normalize="Normalize" in places)


def resolve_dtype(config: Config, dtype: str) -> str:
    """``float32`` or ``bfloat16``; ``auto`` is the checkpoint's type, with bfloat16 for every 16-bit one."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if (config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16") else "float32"
