"""From a folder to a running model: checks every tensor, then streams the weights, quantizing them on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from tokenmill.errors import ModelError
from tokenmill.models.decoder import Decoder, usable
from tokenmill.models.family import Family, Into, unsupported
from tokenmill.models.folder import family_of, read_config, read_json, resolve_dtype
from tokenmill.models.spec import ModelSpec, is_norm, weight_shapes
from tokenmill.quant.checkpoint import optional_tensors, read_linear, tensor_shapes
from tokenmill.quant.scheme import FORMATS, Scheme, read_scheme
from tokenmill.quant.weight import Format, Quantized

__all__ = ["dtype_bytes", "load", "load_weights"]

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
    quantize: str = "none",
    block_size: int = 0,
) -> Decoder:
    """The model in folder `path`, ready to run; see `load_weights` for the other arguments and the errors.

    Args:
        block_size: of the KV cache it will be given. The native CPU kernels run it if they can with that; 0 keeps to
            the plain operators.
    """
    kind = DTYPES[resolve_dtype(path, dtype)]
    native = usable(_described(path, max_model_len)[1], kind, torch.device(device), block_size)
    # Native layers round what they pack. The plain operators get weights that are rounded and given back.
    packs = native and quantize in ("int8", "int4")
    spec, weights = load_weights(path, dtype, device, progress, max_model_len, "none" if packs else quantize)
    rounded = any(isinstance(each, Quantized) for each in weights.values())
    dense = {
        name: each.dequantize().to(kind) if isinstance(each, Quantized) else each for name, each in weights.items()
    }
    if not native:
        return Decoder(spec, dense)
    return Decoder(spec, dense, cast(Any, quantize) if packs and not rounded else "bf16")


def load_weights(
    path: Path,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
    max_model_len: int = 0,
    quantize: str = "none",
) -> tuple[ModelSpec, dict[str, Tensor | Quantized]]:
    """What the model in folder `path` is, and every tensor that `spec.weight_shapes` names.

    All names and shapes are checked before the first weight is read. Files are memory-mapped and tensors brought one
    by one to their place, a few rows at a time where they are quantized, so memory peaks at the weights as they are
    kept plus one tensor.

    Args:
        dtype: ``auto``, ``float32`` or ``bfloat16``; see `resolve_dtype`.
        device: a torch device.
        progress: called after each tensor with bytes done and bytes in all, as the checkpoint stores them.
        max_model_len: see `read_spec`.
        quantize: a format of `quant.formats` for embedding, head and linear layers, or ``none``. Layers that the
            checkpoint holds quantized stay as they are.

    Raises:
        ModelError: as `read_spec` and `quant.scheme.read_scheme`; ``checkpoint_mismatch`` when a tensor is missing,
            left over or of a wrong shape; ``unsupported_model`` when q, k and v or gate and up are not stored alike.
        ConfigError: ``unknown_choice`` for a format that there is not.
    """
    family, spec, scheme = _described(path, max_model_len)
    format = None if quantize == "none" else cast(Format, FORMATS.get(quantize))
    kind = DTYPES[resolve_dtype(path, dtype)]
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in _weight_files(path)]
        sources = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        places = _match(family, spec, scheme, {name: tuple(each.get_shape()) for name, each in sources.items()})
        sizes = {name: _count(each.get_shape()) * _BYTES.get(each.get_dtype(), 1) for name, each in sources.items()}
        total = sum(sizes[name] for place in places for name in place.names)
        done = 0
        filling = {name: _Filling(shape) for name, shape in weight_shapes(spec).items()}
        for place in places:
            target = filling[place.target]
            if place.scheme is not None:
                tensors = {name.rpartition(".")[2]: sources[name][:].to(device) for name in place.names}
                target.keep(place.rows, read_linear(place.scheme, tensors, place.shape, place.name))
            elif format is not None and len(target.shape) == 2:
                for rows, chunk in _chunks(sources[place.name], place):
                    target.keep(rows, format.quantize(chunk.to(device).float()))
            else:
                tensor = sources[place.name][:]
                stored = torch.float32 if is_norm(place.target) else kind
                target.copy(place.rows, tensor.float().add_(place.offset) if place.offset else tensor, stored, device)
            done += sum(sizes[name] for name in place.names)
            if progress is not None:
                progress(done, total)
        return spec, {name: each.weight() for name, each in filling.items()}


def _described(path: Path, max_model_len: int) -> tuple[Family, ModelSpec, Scheme | None]:
    """The family of the model in a folder, its spec as `read_spec` has it, and how its weights are quantized."""
    config = read_config(path)
    said = config.get("quantization_config")
    scheme = read_scheme(said) if said else None
    family = family_of({**config, "quantization_config": None})
    spec = family.spec(config)
    if max_model_len:
        spec = replace(spec, max_position=min(max_model_len, spec.max_position))
    return family, spec, scheme


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
"""Bytes of an element, by the name of its type in a safetensors file; all others have one."""

_CHUNK = 2**22
"""Weights that are quantized at a time: a head of 150,000 rows never exists whole in float32."""


class _Filling:
    """One of our tensors while its parts come in."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._dense: Tensor | None = None
        self._kept: list[tuple[int, Quantized]] = []

    def copy(self, rows: slice, tensor: Tensor, dtype: torch.dtype, device: str | torch.device) -> None:
        if self._dense is None:
            self._dense = torch.empty(self.shape, dtype=dtype, device=device)
        self._dense[rows].copy_(tensor)

    def keep(self, rows: slice, part: Quantized) -> None:
        self._kept.append((rows.start, part))

    def weight(self) -> Tensor | Quantized:
        """All of it; to be called once."""
        if self._dense is not None:
            return self._dense
        parts = [part for _, part in sorted(self._kept, key=lambda each: each[0])]
        self._kept.clear()
        return Quantized.cat(parts)


def _chunks(source: Any, place: _Place) -> Iterator[tuple[slice, Tensor]]:
    """A tensor some rows at a time, each with the rows of the target that it fills."""
    outputs, inputs = place.shape
    step = max(1, _CHUNK // inputs)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        yield slice(place.rows.start + start, place.rows.start + stop), source[start:stop]


def _count(shape: Sequence[int]) -> int:
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
    """Where a tensor of the model, as its family names it, goes: which rows of which of our tensors."""

    name: str
    shape: tuple[int, ...]
    target: str
    rows: slice
    offset: float
    scheme: Scheme | None = None
    """How the checkpoint has it quantized, if it has."""
    names: tuple[str, ...] = ()
    """The checkpoint's tensors that it is read from."""


def _match(
    family: Family, spec: ModelSpec, scheme: Scheme | None, found: Mapping[str, tuple[int, ...]]
) -> list[_Place]:
    """Finds the tensors of every place, and a place for every tensor of the checkpoint.

    Raises:
        ModelError: ``checkpoint_mismatch`` naming the tensor; ``unsupported_model`` when parts of one of our tensors
            are not stored alike.
    """
    places: list[_Place] = []
    used: set[str] = set()
    alike: dict[str, Scheme | None] = {}
    for place in _wanted(family, spec):
        stored = scheme if _is_quantized(place, scheme, found) else None
        expected, optional = _tensors(place, stored)
        for name, shape in expected.items():
            if name not in found:
                raise _mismatch(name, "is missing from the checkpoint")
            if found[name] != shape:
                raise _mismatch(name, f"has shape {list(found[name])}, but config.json makes it {list(shape)}")
        if alike.setdefault(place.target, stored) != stored:
            raise unsupported(f"{place.name!r} is quantized and the layers it is joined with are not, or the reverse")
        names = (*expected, *sorted(optional & found.keys()))
        used.update(names)
        places.append(replace(place, scheme=stored, names=names))
    for name in found.keys() - used:
        if not _ignored(family, spec, name):
            raise _mismatch(name, "is in the checkpoint, but a model like this has no such tensor")
    return places


def _is_quantized(place: _Place, scheme: Scheme | None, found: Mapping[str, tuple[int, ...]]) -> bool:
    if scheme is None or len(place.shape) != 2:
        return False
    return f"{place.name.removesuffix('weight')}{scheme.marker}" in found


def _tensors(place: _Place, scheme: Scheme | None) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """The shapes of the tensors that must be there, and the names of those that may be."""
    if scheme is None:
        return {place.name: place.shape}, frozenset()
    stem = place.name.removesuffix("weight")
    shapes = tensor_shapes(scheme, place.shape)
    return {stem + part: shape for part, shape in shapes.items()}, frozenset(
        stem + part for part in optional_tensors(scheme)
    )


def _mismatch(name: str, what: str) -> ModelError:
    return ModelError("checkpoint_mismatch", f"Tensor {name!r} {what}.", name)


def _wanted(family: Family, spec: ModelSpec) -> Iterator[_Place]:
    """Each tensor that the model is made of."""
    shapes = weight_shapes(spec)
    for pattern, into in family.weights.items():
        if into is None:
            continue
        for index in range(len(spec.layers)) if "{}" in pattern else (0,):
            target = into.target.format(index)
            if target in shapes:
                start, stop = _rows(spec, into, index, shapes[target][0])
                shape = (stop - start, *shapes[target][1:])
                yield _Place(pattern.format(index), shape, target, slice(start, stop), into.offset)


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
