"""What a quantized checkpoint says about itself, and the formats there are. No torch.

``config.json`` of such a checkpoint has a section ``quantization_config``; `read_scheme` turns the dialects of GPTQ,
AWQ and compressed-tensors into one `Scheme`, or refuses with a reason what cannot be run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenmill.errors import ModelError
from tokenmill.registry import Registry

__all__ = ["ACTIVATIONS", "FORMATS", "Layout", "Rounding", "Scheme", "read_scheme"]

FORMATS: Registry[Any] = Registry("tokenmill.quant.formats", "formats", "FORMAT")
"""Weight formats: each module defines ``FORMAT``, a `quant.weight.Format`."""


ACTIVATIONS = ("int8", "bf16")
"""What the inputs of a product with a quantized weight may be rounded to."""


@dataclass(frozen=True)
class Rounding:
    """What a model's weights are rounded to while they are loaded, and their inputs when they are used."""

    quantize: str = "none"
    """A name of `FORMATS`, or ``none``."""
    quantize_head: str = "auto"
    """The same for embedding and head alone, or ``auto``."""
    activations: str = "int8"
    """One of `ACTIVATIONS`, for all quantized weights, those of a quantized checkpoint too."""

    @property
    def head(self) -> str:
        """The format of embedding and head: every token goes through both, so ``auto`` makes ``int8`` of ``int4``.

        On the built-in model 4 bits in these two make a quarter of what 4 bits cost in all matrices (docs/log.md).
        """
        if self.quantize_head != "auto":
            return self.quantize_head
        return "int8" if self.quantize == "int4" else self.quantize

    def format_of(self, name: str) -> str:
        """The format of a matrix, or ``none``; `name` is one of `models.spec.weight_shapes`."""
        return self.head if name in ("embedding", "head") else self.quantize


Layout = Literal["gptq", "gptq_v2", "awq", "pack-quantized", "int-quantized"]

_MARKERS: Mapping[Layout, str] = {
    "gptq": "qweight",
    "gptq_v2": "qweight",
    "awq": "qweight",
    "pack-quantized": "weight_packed",
    "int-quantized": "weight_scale",
}


@dataclass(frozen=True)
class Scheme:
    """How the linear weights of a checkpoint are stored."""

    layout: Layout
    """``gptq`` stores zero points less one, ``gptq_v2`` as they are."""
    bits: int
    """4 or 8."""
    group: int
    """Inputs that share a scale; 0 is all of a row."""
    symmetric: bool
    """Whether the zero point is the middle of the range."""

    @property
    def marker(self) -> str:
        """The tensor that a linear layer has if, and only if, it is quantized: which layers are is read from the
        checkpoint's own tensors, not from its patterns of names."""
        return _MARKERS[self.layout]

    def groups(self, inputs: int) -> int:
        """Groups in a row of so many inputs; the last may be cut short."""
        return -(-inputs // self.group) if self.group else 1


def read_scheme(said: Mapping[str, Any]) -> Scheme:
    """The scheme that a ``quantization_config`` describes.

    Activation quantization is not part of it: activations are quantized per token whatever the checkpoint says, which
    is at least as fine as any static scale.

    Raises:
        ModelError: ``unsupported_model`` with the reason.
    """
    method = said.get("quant_method")
    match method:
        case "gptq":
            return _gptq(said)
        case "awq":
            return _awq(said)
        case "compressed-tensors":
            return _compressed_tensors(said)
    raise _unsupported(f"quant_method {method!r} is not one of gptq, awq and compressed-tensors")


def _unsupported(reason: str) -> ModelError:
    return ModelError("unsupported_model", f"This quantized checkpoint cannot be run: {reason}.", "quantization_config")


def _scheme(layout: Layout, bits: Any, group: Any, symmetric: bool) -> Scheme:
    if bits not in (4, 8):
        raise _unsupported(f"its weights have {bits!r} bits, not 4 or 8")
    size = int(group or 0)
    if size > 0 and size % 32:
        raise _unsupported(f"its groups of {size} inputs are not whole multiples of 32")
    return Scheme(layout, int(bits), max(size, 0), symmetric)


def _gptq(said: Mapping[str, Any]) -> Scheme:
    if said.get("dynamic"):
        raise _unsupported("GPTQ with settings that differ from layer to layer ('dynamic')")
    layout = said.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise _unsupported(f"GPTQ's checkpoint_format {layout!r} is not gptq or gptq_v2")
    return _scheme(layout, said.get("bits"), said.get("group_size"), bool(said.get("sym", True)))


def _awq(said: Mapping[str, Any]) -> Scheme:
    version = str(said.get("version", "gemm")).lower()
    if version != "gemm":
        raise _unsupported(f"AWQ's version {version!r} is not gemm")
    group = said.get("group_size", said.get("q_group_size"))
    if said.get("bits", said.get("w_bit")) != 4:
        raise _unsupported("AWQ with other than 4 bits")
    return _scheme("awq", 4, group, not said.get("zero_point", True))


def _compressed_tensors(said: Mapping[str, Any]) -> Scheme:
    sections = list((said.get("config_groups") or {}).values())
    if len(sections) != 1:
        raise _unsupported(f"it has {len(sections)} config_groups, not one")
    if said.get("transform_config"):
        raise _unsupported("its activations must be rotated at run time ('transform_config')")
    if said.get("sparsity_config"):
        raise _unsupported("its weights are sparse")
    layout = sections[0].get("format") or said.get("format")
    if layout not in ("pack-quantized", "int-quantized"):
        raise _unsupported(f"its format {layout!r} is not pack-quantized or int-quantized")
    weights: Mapping[str, Any] = sections[0].get("weights") or {}
    if weights.get("type", "int") != "int":
        raise _unsupported(f"its weights are of type {weights['type']!r}, not int")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("channel", "group"):
        raise _unsupported(f"its weights are scaled per {strategy}, not per channel or group")
    group = weights.get("group_size") if strategy == "group" else 0
    scheme = _scheme(layout, weights.get("num_bits"), group, bool(weights.get("symmetric", True)))
    if layout == "int-quantized" and (scheme.bits, scheme.group, scheme.symmetric) != (8, 0, True):
        raise _unsupported("int-quantized weights other than 8 bits, symmetric and per channel")
    return scheme
