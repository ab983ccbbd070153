"""All layers of a model in one native call, which a step makes once and without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.cpu import _native
from tokenmill.kernels.cpu.attention_ops import PackedCache
from tokenmill.kernels.cpu.fused_ops import AttentionInput, MlpInput
from tokenmill.kernels.cpu.packed import PackedWeight

__all__ = ["Layer", "Stack", "WayBack"]


@dataclass(frozen=True)
class WayBack:
    """``residual += projection(x)``, or, with a norm, ``residual += norm(projection(x))``."""

    projection: PackedWeight
    norm: Tensor | None
    """[H] float32"""
    eps: float

    def native(self) -> _native.WayBack:
        return _native.WayBack(self.projection.native, 0 if self.norm is None else self.norm.data_ptr(), self.eps)


@dataclass(frozen=True)
class Layer:
    """One layer of any kind: norms before the two halves are in the calls that begin them, norms after in the ways
    back.
    """

    attention: AttentionInput
    scale: float
    """This and the next two as `kernels.paged_attention` takes them."""
    window: int | None
    softcap: float | None
    from_attention: WayBack
    mlp: MlpInput
    from_mlp: WayBack
    rope: int
    """Which of a batch's angles it rotates by."""


class Stack:
    """Layers with their caches. One thread at a time may call it.

    Args:
        layers: from first to last.
        caches: of each layer.
        groups: for each layer, which of a batch's slots and block tables belong to its cache.
    """

    def __init__(self, layers: Sequence[Layer], caches: Sequence[PackedCache], groups: Sequence[int]) -> None:
        self._keep = (tuple(layers), tuple(caches))
        self._native = _native.Stack(
            [
                _native.Layer(
                    layer.attention.native,
                    cache.native,
                    layer.scale,
                    layer.window or 0,
                    layer.softcap or 0.0,
                    layer.from_attention.native(),
                    layer.mlp.native,
                    layer.from_mlp.native(),
                    layer.rope,
                    group,
                )
                for layer, cache, group in zip(layers, caches, groups, strict=True)
            ]
        )

    def __call__(
        self,
        x: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        slots: Sequence[Tensor],
        block_tables: Sequence[Tensor],
        query_start: Tensor,
        context_lens: Tensor,
    ) -> Tensor:
        """Runs all layers. Writes the tokens' keys and values into the caches.

        Args:
            x: [T, H] bfloat16, contiguous: the residual stream, changed in place.
            angles: cosine and sine [T, R/2] float32, contiguous, by rope.
            slots: [T] int64 by group, negative to write nothing.
            block_tables: [R, M] int32 by group, its columns side by side.
            query_start, context_lens: as `kernels.paged_attention` takes them.

        Returns:
            x.
        """
        tokens = x.shape[0]
        memory = torch.empty(self._native.bytes(tokens), dtype=torch.uint8)
        self._native(
            x.data_ptr(),
            tokens,
            context_lens.shape[0],
            [cos.data_ptr() for cos, _ in angles],
            [sin.data_ptr() for _, sin in angles],
            [each.data_ptr() for each in slots],
            [table.data_ptr() for table in block_tables],
            [table.stride(0) for table in block_tables],
            query_start.data_ptr(),
            context_lens.data_ptr(),
            memory.data_ptr(),
        )
        return x

    @property
    def seconds(self) -> dict[str, float]:
        """What the parts of all layers have taken since the start."""
        names = ("norm, qkv, rotation, cache write", "attention", "norm, gate and up", "the two ways back")
        return dict(zip(names, self._native.seconds(), strict=True))
