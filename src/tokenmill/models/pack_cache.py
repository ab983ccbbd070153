"""Packed weights kept in a file, so that the next start maps them into memory instead of making them.

The file is ``<model folder>/.tokenmill/<formats>.safetensors``, or, where that cannot be written, the same under
``~/.cache/tokenmill/packs/<hash of the folder>`` (or ``$XDG_CACHE_HOME``). Its header says what it was made of: a file
of another checkpoint, version or layout is replaced. It is written under another name and renamed when all of it is on
the disk, so nobody ever sees a part of it, and whoever still has an older one mapped keeps that.

What is checked at a start is the header and the length. The bytes of weights are trusted, as those of a checkpoint are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenmill.layers.native import PackedWeight
from tokenmill.models.checkpoint import weight_files
from tokenmill.models.spec import ModelSpec, weight_shapes
from tokenmill.quant.scheme import Rounding

__all__ = ["PackCache"]

_VERSION = 2
"""Of the layout in `kernels.cpu.packed` and of what rounding gives: to be raised when either changes."""

_ALIGN = 64
"""Bytes: what vector loads like weights to begin at a multiple of."""

_DTYPES = {"U8": torch.uint8, "F32": torch.float32}
"""By their names in the file."""

_logger = logging.getLogger(__name__)


class PackCache:
    """The packed weights of one model, rounded in one way.

    What inputs are rounded to leaves the weights as they are: one file serves all `Rounding.activations`.

    Args:
        folder: the model's.
    """

    def __init__(self, folder: Path, rounding: Rounding) -> None:
        folder = folder.resolve()
        self._activations = rounding.activations
        formats = [each.replace("none", "bf16") for each in (rounding.quantize, rounding.head)]
        self._key = _key(folder, formats)
        plain = rounding.head == Rounding(rounding.quantize).head
        file = f"{formats[0] if plain else f'{formats[0]}-head-{formats[1]}'}.safetensors"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        elsewhere = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        self._places = (folder / ".tokenmill" / file, cache / "tokenmill" / "packs" / elsewhere / file)

    def read(self, spec: ModelSpec) -> dict[str, Tensor | PackedWeight] | None:
        """The weights as `write` got them, mapped from a file; None if there is none that can be used.

        Logs why a file that is there cannot.
        """
        for place in self._places:
            try:
                return self._open(place, spec)
            except FileNotFoundError:
                continue
            except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
                _logger.warning("The packed weights in %s cannot be used: %s. They are made anew.", place, error)
        return None

    def write(self, weights: Mapping[str, Tensor | PackedWeight]) -> None:
        """Keeps weights, in the first place where that is possible. Logs when there is none."""
        for place in self._places:
            partial = place.with_name(f"{place.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._save(partial, weights)
                    partial.replace(place)
                finally:
                    partial.unlink(missing_ok=True)
            except OSError as error:
                _logger.info("Packed weights cannot be kept in %s: %s.", place, error)
            else:
                _logger.info("Packed weights are kept in %s.", place)
                return
        _logger.warning("Packed weights could not be kept, neither in %s nor in %s.", *self._places)

    def _open(self, place: Path, spec: ModelSpec) -> dict[str, Tensor | PackedWeight]:
        header, data = _map(place)
        said = header.pop("__metadata__", {})
        if said.get("key") != self._key:
            raise ValueError("they are of another checkpoint or version")
        described: dict[str, dict[str, Any]] = json.loads(said["weights"])
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in described}
        for full, entry in header.items():
            name, part = full.split("/")
            begin, end = entry["data_offsets"]
            if end > len(data):
                raise ValueError("the file is cut short")
            tensors[name][part] = data[begin:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
        found: dict[str, Tensor | PackedWeight] = {}
        for name, parts in tensors.items():
            if described[name]:
                found[name] = PackedWeight(tensors=parts, **described[name]).taking(self._activations)
            else:
                found[name] = parts["tensor"]
        biases = {f"{name}_bias" for name in found}
        if weight_shapes(spec).keys() - biases != found.keys():
            raise ValueError("they are not those of the model")
        return found

    def _save(self, file: Path, weights: Mapping[str, Tensor | PackedWeight]) -> None:
        # Written by hand: the library would make a copy of all weights in memory.
        tensors = dict(_tensors(weights))
        offset, header = 0, {}
        for name, tensor in tensors.items():
            header[name] = {
                "dtype": next(name for name, dtype in _DTYPES.items() if dtype == tensor.dtype),
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        described = {
            name: {
                "format": weight.format,
                "outputs": weight.outputs,
                "inputs": weight.inputs,
                "gated": weight.is_gated,
                "group": weight.group,
            }
            if isinstance(weight, PackedWeight)
            else {}
            for name, weight in weights.items()
        }
        said = json.dumps({"__metadata__": {"key": self._key, "weights": json.dumps(described)}} | header).encode()
        said += b" " * (-(8 + len(said)) % _ALIGN)
        with file.open("xb") as out:
            out.write(len(said).to_bytes(8, "little") + said)
            for tensor in tensors.values():
                tensor.contiguous().numpy().tofile(out)
            out.flush()
            os.fsync(out.fileno())


def _map(file: Path) -> tuple[dict[str, Any], Tensor]:
    """The header of a safetensors file and its data, [bytes] uint8, mapped into memory.

    By hand: the library takes milliseconds to a tensor, a third of a second for a model of 0.6 billion parameters.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size - 8:
            raise ValueError("the file is cut short")
        header = json.loads(opened.read(length))
        data = np.memmap(opened, np.uint8, "c", offset=8 + length)  # private: what is mapped must be writable for torch
    return header, torch.from_numpy(data)


def _tensors(weights: Mapping[str, Tensor | PackedWeight]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of all weights; those of a whole multiple of `_ALIGN` first, so that each of them is aligned."""
    named = [
        (f"{name}/{part}", tensor)
        for name, weight in weights.items()
        for part, tensor in (weight.tensors if isinstance(weight, PackedWeight) else {"tensor": weight}).items()
    ]
    yield from sorted(named, key=lambda each: each[1].nbytes % _ALIGN != 0)


def _key(folder: Path, formats: list[str]) -> str:
    """A hash of all that packed weights depend on. Weight files count by name, size and time of change."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(folder)]
    config = (folder / "config.json").read_text(encoding="utf-8")
    made_of = [_VERSION, formats, files, config]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
