"""The demo model as a module that can be trained: the Qwen3 architecture under its Hugging Face names.

Rows hold several documents one after another; a token sees only its own document.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

__all__ = ["DemoModel", "ModelConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model, under the names of the Hugging Face configuration."""

    vocab_size: int = 4096
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1024
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys and rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | BlockMask) -> Tensor:
        """Attend within the mask; `x` is (rows, positions, hidden)."""
        rows, positions, _ = x.shape
        split = (rows, positions, -1, self.head_dim)
        q = _rotate(self.q_norm(self.q_proj(x).view(split)).transpose(1, 2), rotation)
        k = _rotate(self.k_norm(self.k_proj(x).view(split)).transpose(1, 2), rotation)
        v = self.v_proj(x).view(split).transpose(1, 2)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if isinstance(mask, BlockMask):
            out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
            assert isinstance(out, Tensor)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        result: Tensor = self.o_proj(out.transpose(1, 2).reshape(rows, positions, -1))
        return result


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., hidden) to (..., hidden)."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | BlockMask) -> Tensor:
        """Map (rows, positions, hidden) to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class DemoModel(nn.Module):
    """A Qwen3 decoder for training; its parameters have the names of the Hugging Face layout below `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Every layer adds two outputs to the residual stream; their start is scaled so that the sum keeps its size.
        small = 0.02 / math.sqrt(2 * config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=small if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02)

    def forward(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Give the final hidden states, (rows, positions, hidden), of packed documents.

        `tokens` and `documents` are (rows, positions); a token sees the earlier tokens of its own document.
        """
        rotation = _rotation(self.config, tokens.shape[1], tokens.device)
        mask = _document_mask(documents)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rotation, mask)
        result: Tensor = self.norm(x)
        return result

    def losses(self, hidden: Tensor, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Give the negative log-likelihood, in nats, of each token after the first of its row where `chosen`.

        `chosen` is (rows, positions) of bool; the result has one entry a chosen position, in row-major order.
        """
        targets = chosen[:, 1:]
        logits = F.linear(hidden[:, :-1][targets], self.embed_tokens.weight)
        return F.cross_entropy(logits.float(), tokens[:, 1:][targets], reduction="none")


def _rotation(config: ModelConfig, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = config.rope_theta ** (
        -torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    )
    angles = torch.outer(torch.arange(positions, device=device, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rotation[0] + torch.cat((-second, first), dim=-1) * rotation[1]


def _document_mask(documents: Tensor) -> Tensor | BlockMask:
    """Let each position see the earlier positions of its document: sparse on a GPU, dense elsewhere."""
    rows, positions = documents.shape
    if documents.device.type != "cuda":
        same = documents[:, :, None] == documents[:, None, :]
        return (same & torch.ones(positions, positions, dtype=torch.bool).tril())[:, None]

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    return _compiled_block_mask()(visible, rows, None, positions, positions, device=documents.device)


@functools.cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    # Uncompiled, this would build the whole rows x positions x positions mask in memory.
    return torch.compile(create_block_mask)
