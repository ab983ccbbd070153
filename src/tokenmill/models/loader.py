"""From a folder to a running model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tokenmill.models.checkpoint import Checkpoint
from tokenmill.models.decoder import Decoder, usable
from tokenmill.models.folder import family_of, read_config, resolve_dtype
from tokenmill.models.spec import ModelSpec
from tokenmill.quant.scheme import FORMATS, Rounding, read_scheme
from tokenmill.quant.weight import Format, Quantized

__all__ = ["dtype_bytes", "load", "load_weights"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Progress = Callable[[int, int], None]

_AS_STORED = Rounding()


def dtype_bytes(dtype: str) -> int:
    """Bytes per element of ``float32`` or ``bfloat16``."""
    return DTYPES[dtype].itemsize


def load(
    path: Path,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    max_model_len: int = 0,
    rounding: Rounding = _AS_STORED,
    block_size: int = 0,
    pack_cache: bool = False,
) -> Decoder:
    """The model in folder `path`, ready to run.

    Files are memory-mapped and tensors brought one by one to the form in which they are kept, so memory peaks at the
    weights as they are kept plus one tensor. All names and shapes are checked before the first one is read.

    Args:
        dtype: ``auto``, ``float32`` or ``bfloat16``; see `resolve_dtype`.
        device: a torch device.
        progress: called after each tensor with bytes done and bytes in all, as the checkpoint stores them.
        max_model_len: see `read_spec`.
        rounding: of embedding, head and linear layers. Layers that the checkpoint holds quantized stay as they are.
        block_size: of the KV cache it will be given. The native CPU kernels run it if they can with that; 0 keeps to
            the plain operators.
        pack_cache: whether weights packed for the native kernels are read from a file of an earlier start, which is
            written if there is none; see `models.pack_cache`.

    Raises:
        ModelError: as `read_spec`, `quant.scheme.read_scheme` and `Checkpoint`.
        ConfigError: ``unknown_choice`` for a format that there is not.
    """
    checkpoint = _open(path, dtype, device, max_model_len)
    spec, kind = checkpoint.spec, checkpoint.dtype
    native = usable(spec, kind, checkpoint.device, block_size)
    if not (native and pack_cache):
        return Decoder(spec, _read(checkpoint, rounding, progress, native), kind, native)
    from tokenmill.models.pack_cache import PackCache

    cache = PackCache(path, rounding)
    weights = cache.read(spec)
    if weights is None:
        weights = _read(checkpoint, rounding, progress, native)
        cache.write(weights)
    elif progress is not None:
        progress(1, 1)
    return Decoder(spec, weights, kind, native)


def load_weights(
    path: Path,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    max_model_len: int = 0,
    rounding: Rounding = _AS_STORED,
) -> tuple[ModelSpec, dict[str, Tensor | Quantized]]:
    """What the model in folder `path` is, and every tensor that `spec.weight_shapes` names, for the plain operators.

    Arguments and errors are those of `load`.
    """
    checkpoint = _open(path, dtype, device, max_model_len)
    return checkpoint.spec, _read(checkpoint, rounding, progress, native=False)


def _open(path: Path, dtype: str, device: str | torch.device, max_model_len: int) -> Checkpoint:
    config = read_config(path)
    said = config.get("quantization_config")
    scheme = read_scheme(said) if said else None
    family = family_of({**config, "quantization_config": None})
    spec = family.spec(config)
    if max_model_len:
        spec = replace(spec, max_position=min(max_model_len, spec.max_position))
    return Checkpoint(path, family, spec, scheme, DTYPES[resolve_dtype(config, dtype)], torch.device(device))


def _read(checkpoint: Checkpoint, rounding: Rounding, progress: Progress | None, native: bool) -> dict[str, Any]:
    """Every weight in the form in which it is kept; see `Decoder`."""
    total, done = sum(map(checkpoint.nbytes, checkpoint.shapes)), 0
    weights: dict[str, Any] = {}
    for name, shape in checkpoint.shapes.items():
        chosen = rounding.format_of(name)
        packs = native and chosen in ("int8", "int4")  # the kernels round what they pack, faster
        format = None if packs or chosen == "none" else cast(Format, FORMATS.get(chosen))
        if native and len(shape) == 2:
            from tokenmill.models.native import packed

            bias = checkpoint.read(f"{name}_bias") if f"{name}_bias" in checkpoint.shapes else None
            stored = checkpoint.read(name, format, copy=False)
            weights[name] = packed(name, stored, cast(Tensor | None, bias), chosen, rounding.activations)
        elif not (native and name.endswith("_bias")):
            weight = checkpoint.read(name, format)
            weights[name] = weight if isinstance(weight, Tensor) else replace(weight, activations=rounding.activations)
        done += checkpoint.nbytes(name)
        if progress is not None:
            progress(done, total)
    return weights
