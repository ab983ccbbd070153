"""From a folder to a running model: checks every tensor, then streams the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from tokenmill.errors import ModelError
from tokenmill.models.decoder import Decoder
from tokenmill.models.family import Family, Into
from tokenmill.models.folder import family_of, read_config, read_json, read_spec, resolve_dtype
from tokenmill.models.spec import ModelSpec, is_norm, weight_shapes

__all__ = ["dtype_bytes", "load"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    family = family_of(read_config(path))
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
    index = read_json(path / "model.safetensors.index.json")
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
