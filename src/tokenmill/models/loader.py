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
from tokenmill.quant.scheme import FORMATS, format_of, read_scheme
from tokenmill.quant.weight import Format, Quantized

__all__ = ["dtype_bytes", "load", "load_weights"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Progress = Callable[[int, int], None]


def dtype_bytes(dtype: str) -> int:
    """Bytes per element of ``float32`` or ``bfloat16``."""
    return DTYPES[dtype].itemsize


def load(
    path: Path,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    max_model_len: int = 0,
    quantize: str = "none",
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
        quantize: a format of `quant.formats` for embedding, head and linear layers, or ``none``; see `format_of`.
            Layers that the checkpoint holds quantized stay as they are.
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
        return Decoder(spec, _read(checkpoint, quantize, progress, native), kind, native)
    from tokenmill.models.pack_cache import PackCache

    cache = PackCache(path, quantize)
    weights = cache.read(spec)
    if weights is None:
        weights = _read(checkpoint, quantize, progress, native)
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
    quantize: str = "none",
) -> tuple[ModelSpec, dict[str, Tensor | Quantized]]:
    """What the model in folder `path` is, and every tensor that `spec.weight_shapes` names, for the plain operators.

    Arguments and errors are those of `load`.
    """
    checkpoint = _open(path, dtype, device, max_model_len)
    return checkpoint.spec, _read(checkpoint, quantize, progress, native=False)


def _open(path: Path, dtype: str, device: str | torch.device, max_model_len: int) -> Checkpoint:
    config = read_config(path)
    said = config.get("quantization_config")
    scheme = read_scheme(said) if said else None
    family = family_of({**config, "quantization_config": None})
    spec = family.spec(config)
    if max_model_len:
        spec = replace(spec, max_position=min(max_model_len, spec.max_position))
    return Checkpoint(path, family, spec, scheme, DTYPES[resolve_dtype(config, dtype)], torch.device(device))


def _read(checkpoint: Checkpoint, quantize: str, progress: Progress | None, native: bool) -> dict[str, Any]:
    """Every weight in the form in which it is kept; see `Decoder`."""
    packs = native and quantize in ("none", "int8", "int4")  # the kernels round what they pack, faster
    total, done = sum(map(checkpoint.nbytes, checkpoint.shapes)), 0
    weights: dict[str, Any] = {}
    for name, shape in checkpoint.shapes.items():
        chosen = format_of(name, quantize)
        format = None if packs or chosen == "none" else cast(Format, FORMATS.get(chosen))
        if native and len(shape) == 2:
            from tokenmill.models.native import packed

            bias = checkpoint.read(f"{name}_bias") if f"{name}_bias" in checkpoint.shapes else None
            weights[name] = packed(name, checkpoint.read(name, format, copy=False), cast(Tensor | None, bias), chosen)
        elif not (native and name.endswith("_bias")):
            weights[name] = checkpoint.read(name, format)
        done += checkpoint.nbytes(name)
        if progress is not None:
            progress(done, total)
    return weights
