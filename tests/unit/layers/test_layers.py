from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tokenmill.layers.attention import HeadNorm, NoNorm, WholeNorm
from tokenmill.layers.embedding import Embedding, LogitsHead
from tokenmill.layers.linear import Linear
from tokenmill.layers.mlp import ACTIVATIONS, GatedMLP
from tokenmill.layers.norm import RMSNorm
from tokenmill.layers.rotary import Rotary

CPU = torch.device("cpu")


def test_rotary_gives_the_angles_of_each_position() -> None:
    cos, sin = Rotary([1.0, 0.1], 1.0, CPU)(torch.tensor([0, 3, 100000]))
    assert cos.dtype == sin.dtype == torch.float32
    for row, position in enumerate((0, 3, 100000)):
        expected = [math.cos(position), math.cos(position / 10)]
        assert cos[row].tolist() == pytest.approx(expected, abs=2e-3)
        assert sin[row].tolist() == pytest.approx([math.sin(position), math.sin(position / 10)], abs=2e-3)


def test_rotary_scales_both() -> None:
    cos, sin = Rotary([1.0], 3.0, CPU)(torch.tensor([1]))
    assert cos.item() == pytest.approx(3 * math.cos(1))
    assert sin.item() == pytest.approx(3 * math.sin(1))


@pytest.mark.parametrize(
    ("name", "function"), [("silu", F.silu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))]
)
def test_mlp_gates_with_the_first_half(name: str, function) -> None:
    gate, up, down = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6)
    x = torch.randn(3, 4)
    mlp = GatedMLP(Linear(torch.cat((gate, up))), Linear(down), ACTIVATIONS[name])
    torch.testing.assert_close(mlp(x), (function(x @ gate.T) * (x @ up.T)) @ down.T)


def test_linear_adds_its_bias() -> None:
    weight, bias, x = torch.randn(3, 4), torch.randn(3), torch.randn(2, 4)
    torch.testing.assert_close(Linear(weight, bias)(x), x @ weight.T + bias)
    torch.testing.assert_close(Linear(weight)(x), x @ weight.T)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt() * weight


def test_head_norm_sees_one_head_and_whole_norm_all() -> None:
    q, k = torch.randn(5, 12), torch.randn(5, 4) * 3
    by_head, whole_q, whole_k = torch.randn(4), torch.randn(12), torch.randn(4)
    got_q, got_k = HeadNorm(RMSNorm(by_head, 0.0), RMSNorm(by_head, 0.0))(q, k, 4)
    torch.testing.assert_close(got_q, norm(q.view(5, 3, 4), by_head))
    torch.testing.assert_close(got_k, norm(k.view(5, 1, 4), by_head))
    got_q, got_k = WholeNorm(RMSNorm(whole_q, 0.0), RMSNorm(whole_k, 0.0))(q, k, 4)
    torch.testing.assert_close(got_q, norm(q, whole_q).view(5, 3, 4))
    torch.testing.assert_close(got_k, norm(k, whole_k).view(5, 1, 4))
    got_q, got_k = NoNorm()(q, k, 4)
    assert torch.equal(got_q.flatten(1), q)
    assert torch.equal(got_k.flatten(1), k)


def test_embedding_scales_rows_and_leaves_the_table() -> None:
    table = torch.randn(5, 3)
    before = table.clone()
    torch.testing.assert_close(Embedding(table, torch.tensor(2.0))(torch.tensor([4, 0])), before[[4, 0]] * 2)
    assert torch.equal(table, before)


def test_logits_are_float32_and_capped() -> None:
    weight, hidden = torch.randn(7, 3), torch.randn(2, 3)
    plain = LogitsHead(Linear(weight.bfloat16()), None)(hidden.bfloat16())
    assert plain.dtype == torch.float32
    capped = LogitsHead(Linear(weight), 0.5)(hidden)
    torch.testing.assert_close(capped, 0.5 * torch.tanh(hidden @ weight.T / 0.5))
