"""The calls of a layer that do several operations in one, prepared once per layer.

A pre-norm layer is five calls: `AttentionInput`, `PackedCache.attend`, `PackedWeight.linear_add`, `MlpInput`,
`PackedWeight.linear_add`. `stack_ops.Stack` makes those of all layers in one.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokenmill.kernels.cpu import _native
from tokenmill.kernels.cpu.attention_ops import PackedCache
from tokenmill.kernels.cpu.packed import Activation, PackedWeight

__all__ = ["AttentionInput", "MlpInput", "QKNorm"]

QKNorm = Literal["none", "per_head", "whole"]

_QK_NORMS = {"none": _native.QKNorm.none, "per_head": _native.QKNorm.head, "whole": _native.QKNorm.whole}
_GATES = {"silu": _native.Epilogue.silu_gated, "gelu_tanh": _native.Epilogue.gelu_gated}


class AttentionInput:
    """From the residual stream to queries and the cache: norm, qkv product, norm of queries and keys, rotation, write.

    Queries and keys are rounded after the product and after the rotation, not between norm and rotation.

    Args:
        norm: [H] float32, or None to take the input as it is.
        eps: of all norms here.
        qkv: [(Hq + 2 Hk) D, H]: rows of q, then k, then v, with its bias if it has one.
        qk_norm: ``per_head`` with weights of [D], ``whole`` with weights of [Hq D] and [Hk D], or ``none``.
        q_norm: weights float32, if there is such a norm.
        k_norm: the same for keys.
        q_heads: Hq.
        head_dim: D.
        rotary_dim: R, the dimensions that are rotated.
    """

    def __init__(
        self,
        norm: Tensor | None,
        eps: float,
        qkv: PackedWeight,
        qk_norm: QKNorm,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        q_heads: int,
        head_dim: int,
        rotary_dim: int,
    ) -> None:
        self._keep = (norm, qkv, q_norm, k_norm)
        self._heads = (q_heads, head_dim)
        self.native = _native.AttentionInput(
            _address(norm),
            eps,
            qkv.native,
            _QK_NORMS[qk_norm],
            _address(q_norm),
            _address(k_norm),
            q_heads,
            rotary_dim // 2,
        )

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: PackedCache, slots: Tensor) -> Tensor:
        """Writes the tokens' keys and values to `cache` and returns the queries.

        Args:
            x: [T, H] bfloat16, contiguous.
            angles: cosine and sine [T, R/2] float32, contiguous.
            cache: of this layer.
            slots: [T] int64, negative to write nothing.

        Returns:
            [T, Hq, D] bfloat16.
        """
        q = x.new_empty(x.shape[0], *self._heads)
        cos, sin = angles
        self.native(
            x.data_ptr(), x.shape[0], cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), cache.native, q.data_ptr()
        )
        return q


class MlpInput:
    """From the residual stream to the input of the down projection: norm, gate and up product, activation(gate) * up.

    Args:
        norm: [H] float32, or None to take the input as it is.
        eps: of the norm.
        gate_up: [2I, H], packed as gated.
        activation: of the gate.
    """

    def __init__(self, norm: Tensor | None, eps: float, gate_up: PackedWeight, activation: Activation) -> None:
        self._keep = (norm, gate_up)
        self._inner = gate_up.outputs // 2
        self.native = _native.MlpInput(_address(norm), eps, gate_up.native, _GATES[activation])

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] bfloat16, contiguous, to [T, I] bfloat16."""
        out = x.new_empty(x.shape[0], self._inner)
        self.native(x.data_ptr(), x.shape[0], out.data_ptr())
        return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
