"""The weights of a model's folder: every name and shape is checked, then they are read one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tokenmill.errors import ModelError
from tokenmill.models.family import Family, Into, unsupported
from tokenmill.models.folder import read_json
from tokenmill.models.spec import ModelSpec, is_norm, weight_shapes
from tokenmill.quant.checkpoint import optional_tensors, read_linear, tensor_shapes
from tokenmill.quant.scheme import Scheme
from tokenmill.quant.weight import Format, Quantized

__all__ = ["Checkpoint", "weight_files"]

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
"""Bytes of an element, by the name of its type in a safetensors file; all others have one."""

_CHUNK = 2**22
"""Weights that are quantized at a time: a head of 150,000 rows never exists whole in float32."""


class Checkpoint:
    """The weights of a folder by our names, those of `spec.weight_shapes`. Reads nothing but the files' headers.

    Args:
        scheme: how its layers are quantized, if they are.
        dtype: what tensors become; norms become float32.
        device: where they go.

    Raises:
        ModelError: ``checkpoint_mismatch`` when a tensor is missing, left over or of a wrong shape;
            ``unsupported_model`` when q, k and v or gate and up are not stored alike.
    """

    def __init__(
        self,
        path: Path,
        family: Family,
        spec: ModelSpec,
        scheme: Scheme | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self._shared = torch.empty(0)
        self._files: dict[str, Path] = {}
        self._sizes: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(path):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    described = tensors.get_slice(name)
                    self._files[name] = file
                    shapes[name] = tuple(described.get_shape())
                    self._sizes[name] = _count(shapes[name]) * _BYTES.get(described.get_dtype(), 1)
        # A model that was saved without its head, as an embedding model is, names its tensors from inside `model`.
        self._outside = "model." if "embed_tokens.weight" in shapes else ""
        shapes = {self._outside + name: shape for name, shape in shapes.items()}
        self._files = {self._outside + name: file for name, file in self._files.items()}
        self._sizes = {self._outside + name: size for name, size in self._sizes.items()}
        self.shapes = weight_shapes(spec)
        self._places: dict[str, list[_Place]] = {name: [] for name in self.shapes}
        for place in _match(family, spec, scheme, shapes):
            self._places[place.target].append(place)

    def nbytes(self, name: str) -> int:
        """Bytes that the checkpoint spends on a tensor."""
        return sum(self._sizes[each] for place in self._places[name] for each in place.names)

    def read(self, name: str, format: Format | None = None, *, copy: bool = True) -> Tensor | Quantized:
        """One tensor.

        Args:
            format: what a matrix is rounded to, a few rows at a time, unless the checkpoint has it quantized.
            copy: whether a tensor is memory of its own. If not it is only to be read, and before the next: it may be a
                view of a file, which changes when that is rewritten, or memory that is used again.
        """
        places = sorted(self._places[name], key=lambda place: place.rows.start)
        if places[0].scheme is not None:
            return Quantized.cat([self._quantized(place) for place in places])
        if format is not None and len(self.shapes[name]) == 2:
            return Quantized.cat([part for place in places for part in self._rounded(place, format)])
        kind = torch.float32 if is_norm(name) else self.dtype
        if len(places) == 1:
            return self._stored(places[0]).to(self.device, kind, copy=copy)
        whole = self._room(self.shapes[name], kind, copy)
        for place in places:
            whole[place.rows].copy_(self._stored(place))
        return whole

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype, own: bool) -> Tensor:
        if own:
            return torch.empty(shape, dtype=dtype, device=self.device)
        # Pages that the system has to give, and clear, for each tensor would take longer than to fill them.
        size = _count(shape)
        if size > self._shared.numel() or dtype != self._shared.dtype:
            self._shared = torch.empty(size, dtype=dtype, device=self.device)
        return self._shared[:size].view(shape)

    def _tensor(self, name: str) -> Tensor:
        # A mapping for each: when the tensor goes, its part of the file no longer counts as memory of this process.
        with safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name.removeprefix(self._outside))  # type: ignore[no-any-return]

    def _stored(self, place: _Place) -> Tensor:
        tensor = self._tensor(place.name)
        return tensor.float() + place.offset if place.offset else tensor

    def _quantized(self, place: _Place) -> Quantized:
        assert place.scheme is not None
        tensors = {name.rpartition(".")[2]: self._tensor(name).to(self.device, copy=True) for name in place.names}
        return read_linear(place.scheme, tensors, place.shape, place.name)

    def _rounded(self, place: _Place, format: Format) -> Iterator[Quantized]:
        tensor = self._tensor(place.name)
        step = max(1, _CHUNK // place.shape[1])
        for start in range(0, place.shape[0], step):
            yield format.quantize(tensor[start : start + step].to(self.device).float())


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def weight_files(path: Path) -> list[Path]:
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
