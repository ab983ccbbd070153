"""A model folder as tensors by name: read one at a time, written a file at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenmill.errors import ModelError
from tokenmill.models.checkpoint import weight_files

__all__ = ["Source", "Target", "opened"]

_INDEX = "model.safetensors.index.json"


class Source:
    """The tensors of a checkpoint. A tensor takes memory when it is read; its file is only mapped.

    Args:
        files: open safetensors files.
    """

    def __init__(self, files: list[Any]) -> None:
        self._owners = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._owners)

    def check(self, name: str) -> None:
        """ModelError ``checkpoint_mismatch`` when there is no such tensor."""
        if name not in self._owners:
            raise ModelError("checkpoint_mismatch", f"Tensor {name!r} is missing from the checkpoint.", name)

    def __getitem__(self, name: str) -> Tensor:
        """New memory."""
        tensor: Tensor = self._owners[name].get_tensor(name)
        return tensor


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The checkpoint in a folder, in one file or in several with an index.

    Raises:
        ModelError: ``checkpoint_mismatch`` when a file is missing.
    """
    with ExitStack() as stack:
        yield Source([stack.enter_context(safe_open(file, framework="pt")) for file in weight_files(path)])


class Target:
    """The same being written: each `add` is a file of its own, so that none but its tensors need be in memory.

    Args:
        folder: exists already.
        files: how many there will be; their names say it.
    """

    def __init__(self, folder: Path, files: int) -> None:
        self._folder, self._files = folder, files
        self._map: dict[str, str] = {}
        self._written = 0
        self.nbytes = 0
        """Bytes of all tensors so far."""

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors to the next file."""
        self._written += 1
        name = f"model-{self._written:05}-of-{self._files:05}.safetensors"
        save_file(dict(tensors), self._folder / name, {"format": "pt"})
        self._map |= dict.fromkeys(tensors, name)
        self.nbytes += sum(tensor.nbytes for tensor in tensors.values())

    def close(self) -> None:
        """Writes the index of all files."""
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(self._map.items()))}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
