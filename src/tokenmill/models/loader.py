"""From a name to a running model: finds the folder, reads its description, checks every tensor, streams the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tokenmill.errors import ConfigError, MissingDependencyError, ModelError, did_you_mean
from tokenmill.models.decoder import Decoder
from tokenmill.models.family import FAMILIES, Config, Family, Into, unsupported
from tokenmill.models.spec import ModelSpec, is_norm, weight_shapes

__all__ = ["Generation", "dtype_bytes", "load", "read_generation", "read_spec", "resolve", "resolve_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
    config = _read_config(path)
    spec = _family(config).spec(config)
    return replace(spec, max_position=min(max_model_len, spec.max_position)) if max_model_len else spec


def _read_config(path: Path) -> Config:
    config = _read_json(path / "config.json")
    if config is None:
        raise ModelError("model_not_found", f"{path} is not a model folder: it has no config.json.", "model")
    return config


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ModelError("checkpoint_mismatch", f"{file} is not valid JSON: {error}.", file.name) from None
    if not isinstance(content, dict):
        raise ModelError("checkpoint_mismatch", f"{file} does not hold a JSON object.", file.name)
    return content


def _family(config: Config) -> Family:
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
    said = _read_json(path / "generation_config.json") or {}
    eos = said.get("eos_token_id")
    if eos is None:
        eos = _read_config(path).get("eos_token_id")
    ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    sampling = {key: said[key] for key in _SAMPLING if said.get(key) is not None} if said.get("do_sample") else {}
    return Generation(ids, sampling)


def resolve_dtype(path: Path, dtype: str) -> str:
    """``float32`` or ``bfloat16``; ``auto`` is the checkpoint's type, with bfloat16 for every 16-bit one."""
    if dtype != "auto":
        return dtype
    config = _read_config(path)
    return "bfloat16" if (config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16") else "float32"


def dtype_bytes(dtype: str) -> int:
    """Bytes per element of ``float32`` or ``bfloat16``."""
    return DTYPES[dtype].itemsize


def load(
    path: Path,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
    max_model_len: int = 0,
) -> Decoder:
    """The model in folder `path`, its weights read from safetensors (one file or several).

    All names and shapes are checked before the first weight is read. Files are memory-mapped and tensors copied one by
    one to their place, so memory peaks at the weights plus one tensor.

    Args:
        dtype: ``auto``, ``float32`` or ``bfloat16``; see `resolve_dtype`.
        device: a torch device.
        progress: called after each tensor with bytes done and bytes in all.
        max_model_len: see `read_spec`.

    Raises:
        ModelError: as `read_spec`; and ``checkpoint_mismatch`` when a tensor is missing, left over or of a wrong shape.
    """
    spec = read_spec(path, max_model_len)
    family = _family(_read_config(path))
    kind = DTYPES[resolve_dtype(path, dtype)]
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in _weight_files(path)]
        sources = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - a file is not a mapping
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in sources.items()}
        places = _match(family, spec, shapes)
        weights = {
            name: torch.empty(shape, dtype=torch.float32 if is_norm(name) else kind, device=device)
            for name, shape in weight_shapes(spec).items()
        }
        total = sum(weights[place.target].itemsize * _count(shapes[name]) for name, place in places.items())
        done = 0
        for name, place in places.items():
            weight = weights[place.target][place.rows]
            tensor = sources[name].get_tensor(name)
            weight.copy_(tensor.float().add_(place.offset) if place.offset else tensor)
            done += weight.nbytes
            if progress is not None:
                progress(done, total)
    return Decoder(spec, weights)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, as its index says if it has one."""
    index = _read_json(path / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    for name in names:
        if not (path / name).is_file():
            raise ModelError("checkpoint_mismatch", f"The weight file {name!r} is missing from {path}.", name)
    return [path / name for name in names]


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint's tensor goes: which rows of which of our tensors."""

    target: str
    rows: slice
    offset: float


def _match(family: Family, spec: ModelSpec, found: Mapping[str, tuple[int, ...]]) -> dict[str, _Place]:
    """Finds the place of every tensor of the checkpoint, and that every place is filled.

    Raises:
        ModelError: ``checkpoint_mismatch`` naming the tensor.
    """
    wanted = {name: (place, shape) for name, place, shape in _wanted(family, spec)}
    places: dict[str, _Place] = {}
    for name, shape in found.items():
        if name in wanted:
            place, expected = wanted[name]
            if shape != expected:
                raise _mismatch(name, f"has shape {list(shape)}, but config.json makes it {list(expected)}")
            places[name] = place
        elif not _ignored(family, spec, name):
            raise _mismatch(name, "is in the checkpoint, but a model like this has no such tensor")
    for name in wanted:
        if name not in places:
            raise _mismatch(name, "is missing from the checkpoint")
    return places


def _mismatch(name: str, what: str) -> ModelError:
    return ModelError("checkpoint_mismatch", f"Tensor {name!r} {what}.", name)


def _wanted(family: Family, spec: ModelSpec) -> Iterator[tuple[str, _Place, tuple[int, ...]]]:
    """Each tensor that the checkpoint must have: its name, its place and its shape."""
    shapes = weight_shapes(spec)
    for pattern, into in family.weights.items():
        if into is None:
            continue
        for index in range(len(spec.layers)) if "{}" in pattern else (0,):
            target = into.target.format(index)
            if target in shapes:
                start, stop = _rows(spec, into, index, shapes[target][0])
                shape = (stop - start, *shapes[target][1:])
                yield pattern.format(index), _Place(target, slice(start, stop), into.offset), shape


def _rows(spec: ModelSpec, into: Into, layer: int, whole: int) -> tuple[int, int]:
    """First row and the row after the last that a tensor fills of its target, which has `whole` rows."""
    attention, mlp = spec.layers[layer].attention, spec.layers[layer].mlp
    q, kv, gate = attention.q_size, attention.kv_size, mlp.intermediate
    rows = {"": (0, whole), "q": (0, q), "k": (q, q + kv), "v": (q + kv, whole), "gate": (0, gate), "up": (gate, whole)}
    return rows[into.part]


def _ignored(family: Family, spec: ModelSpec, name: str) -> bool:
    """Whether the family knows the tensor and the model does not need it: a copy of a tied head, a stored table."""
    pattern = re.sub(r"\.\d+\.", ".{}.", name)
    if pattern not in family.weights:
        return False
    into = family.weights[pattern]
    return into is None or (into.target == "head" and spec.tied_head)
