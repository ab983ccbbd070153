"""A checkpoint with fewer bits to a weight, made from one with all: layer by layer, in the memory of about one.

The linear layers of the blocks are rounded, those that one product computes together with one another. Embedding, head
and norms stay as they are. A method that wants to know what its layers see gets it from a calibration text that goes
through the model as far as it is rounded, so that each layer makes up for the errors of those before.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokenmill.compress.calibration import Calibration
from tokenmill.compress.checkpoint import Source, Target, opened
from tokenmill.errors import ConfigError, ModelError
from tokenmill.layers.embedding import Embedding
from tokenmill.models.decoder import plain_block
from tokenmill.models.family import Family, Into
from tokenmill.models.folder import family_of, read_config, resolve_dtype
from tokenmill.models.spec import ModelSpec, is_norm, weight_shapes
from tokenmill.quant import compressed_tensors
from tokenmill.quant.method import METHODS, Method
from tokenmill.quant.scheme import Scheme

__all__ = ["Outcome", "quantize"]

_PARTS = ("", "q", "k", "v", "gate", "up")
"""Parts of joined tensors, in the order of their rows."""

_LINEAR = 4
"""Linear layers of a block, as we join them."""


@dataclass(frozen=True)
class Outcome:
    """What was made."""

    weights: int
    """How many were rounded."""
    bits_per_weight: float
    """What one of them takes now, scales and all."""
    calibration_tokens: int
    bytes: int
    """Of all tensors, those that stayed as they were included."""


def quantize(
    path: Path,
    out: Path,
    scheme: Scheme,
    method: str,
    windows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Writes the model in folder `path` with rounded linear layers to a new folder `out`, in Hugging Face layout.

    `out` appears when all of it is written. Weights are stored as `quant.compressed_tensors` says, a file per layer.

    Args:
        method: one of `quant.methods`.
        windows: token ids to calibrate with; not looked at unless the method is a calibrated one.
        progress: called with steps done and steps in all.

    Raises:
        ConfigError: ``unknown_choice`` for a method that there is not, ``output_exists``, ``invalid_option`` for groups
            that do not divide the inputs of a layer.
        ModelError: as `models.folder.read_spec`; ``already_quantized``, ``checkpoint_mismatch`` and
            ``calibration_failed``.
    """
    rounding = METHODS.get(method)
    config = read_config(path)
    if config.get("quantization_config"):
        raise ModelError(
            "already_quantized", f"The weights of {path} are quantized. Start from the original model.", "model"
        )
    family = family_of(config)
    spec = family.spec(config)
    _check_groups(spec, scheme)
    if out.exists():
        raise ConfigError("output_exists", f"{out} exists already. Name a folder that does not.", "out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as building, opened(path) as source:
        folder = Path(building) / out.name
        folder.mkdir()
        target = Target(folder, len(spec.layers) + 1)
        outcome = _Run(
            _Model(family, spec, source, resolve_dtype(config, "auto")), target, scheme, rounding, progress
        ).all(windows if rounding.calibrated else ())
        target.close()
        _copy_files(path, folder)
        described = compressed_tensors.description(scheme, ["lm_head"])
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": described}, indent=2) + "\n")
        folder.rename(out)
    return outcome


def _check_groups(spec: ModelSpec, scheme: Scheme) -> None:
    for name, shape in weight_shapes(spec).items():
        if _is_linear(name, shape) and scheme.group and shape[1] % scheme.group:
            raise ConfigError(
                "invalid_option", f"Groups of {scheme.group} do not divide the {shape[1]} inputs of {name!r}.", "group"
            )


def _is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of ours is the weight of a linear layer of a block."""
    return name.startswith("layers.") and len(shape) == 2


def _copy_files(path: Path, folder: Path) -> None:
    """What lies beside weights and configuration: tokenizer, templates, defaults for generation, licences."""
    for file in path.iterdir():
        copied = file.suffix in (".json", ".jinja", ".model", ".txt", ".md") and file.is_file()
        if copied and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, folder / file.name)


@dataclass(frozen=True)
class _Joined:
    """One of our tensors and the checkpoint's tensors that are its rows."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    """Of each of them."""
    tensor: Tensor
    """float32"""


class _Model:
    """The model that is there, by our names.

    Raises:
        ModelError: ``checkpoint_mismatch`` for a tensor that is missing.
    """

    def __init__(self, family: Family, spec: ModelSpec, source: Source, dtype: str) -> None:
        self.spec, self.source = spec, source
        self.dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self._shapes = weight_shapes(spec)
        self._parts: dict[str, list[tuple[str, Into]]] = {name: [] for name in self._shapes}
        for pattern, into in family.weights.items():
            for index in range(len(spec.layers) if "{}" in pattern else 1):
                if into is not None and into.target.format(index) in self._parts:
                    self._parts[into.target.format(index)].append((pattern.format(index), into))
        for name, _ in itertools.chain.from_iterable(self._parts.values()):
            source.check(name)

    def layer(self, index: int) -> dict[str, _Joined]:
        """The tensors of a layer, by our names without their prefix."""
        prefix = f"layers.{index}."
        return {name.removeprefix(prefix): self[name] for name in self._shapes if name.startswith(prefix)}

    def rest(self) -> dict[str, Tensor]:
        """The checkpoint's tensors that are no layer's, by its names."""
        layers = {stored for name, parts in self._parts.items() if name.startswith("layers.") for stored, _ in parts}
        return {name: self.source[name] for name in sorted(self.source.names - layers)}

    def __getitem__(self, name: str) -> _Joined:
        """One tensor.

        Raises:
            ModelError: ``checkpoint_mismatch`` when it has a wrong shape.
        """
        parts = sorted(self._parts[name], key=lambda part: _PARTS.index(part[1].part))
        tensors = [self.source[stored].float() + into.offset for stored, into in parts]
        names, rows = tuple(stored for stored, _ in parts), tuple(len(each) for each in tensors)
        tensor = torch.cat(tensors)
        if tensor.shape != self._shapes[name]:
            raise ModelError(
                "checkpoint_mismatch",
                f"{' and '.join(names)} have shape {list(tensor.shape)}, but config.json makes it "
                f"{list(self._shapes[name])}.",
                names[0],
            )
        return _Joined(names, rows, tensor)

    def ready(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as the layers want it."""
        return tensor if is_norm(name) else tensor.to(self.dtype)


class _Run:
    """One checkpoint on its way.

    Args:
        progress: see `quantize`.
    """

    def __init__(
        self,
        model: _Model,
        target: Target,
        scheme: Scheme,
        method: Method,
        progress: Callable[[int, int], None],
    ) -> None:
        self._model, self._target, self._scheme, self._method = model, target, scheme, method
        self._progress = progress
        self._done = self._steps = 0
        self._weights = self._bytes = 0

    def all(self, windows: Sequence[Sequence[int]]) -> Outcome:
        """Writes every tensor; `windows` are empty if the method needs none."""
        layers = range(len(self._model.spec.layers))
        self._target.add(self._model.rest())
        calibration = Calibration(self._model.spec, self._embedded(windows), self._step)
        self._steps = len(layers) * (_LINEAR + 2 * calibration.batches)
        for index in layers:
            self._target.add(self._layer(index, calibration))
        bits = 8 * self._bytes / self._weights
        return Outcome(self._weights, bits, calibration.tokens, self._target.nbytes)

    def _embedded(self, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        if not windows:
            return []
        model = self._model
        table = model.ready("embedding", model["embedding"].tensor)
        embedding = Embedding(table, torch.tensor(model.spec.embedding_scale, dtype=table.dtype))
        return [embedding(torch.tensor(window)) for window in windows]

    def _layer(self, index: int, calibration: Calibration) -> dict[str, Tensor]:
        """The checkpoint's tensors of one layer, rounded; moves the calibration behind it."""
        model = self._model
        layer, stored = model.spec.layers[index], model.layer(index)
        own = {name: model.ready(name, each.tensor) for name, each in stored.items()}
        seen = calibration.observe(layer, plain_block(layer, own, model.spec.norm_eps))
        tensors: dict[str, Tensor] = {}
        for name, each in stored.items():
            if each.tensor.ndim != 2:
                tensors |= {stem: model.source[stem] for stem in each.names}
                continue
            rounded = self._method.quantize(each.tensor, seen[name], self._scheme)
            own[name] = model.ready(name, rounded.dequantize())
            for stem, part in zip(each.names, rounded.split(each.rows), strict=True):
                made = compressed_tensors.tensors(part, self._scheme)
                tensors |= {stem.removesuffix("weight") + suffix: tensor for suffix, tensor in made.items()}
                self._bytes += sum(tensor.nbytes for tensor in made.values())
            self._weights += each.tensor.numel()
            self._step()
        calibration.advance(layer, plain_block(layer, own, model.spec.norm_eps))
        return tensors

    def _step(self) -> None:
        self._done += 1
        self._progress(self._done, self._steps)
