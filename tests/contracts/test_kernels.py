"""Every implementation of every operation does what the contract in `kernels/ops` says, on the operation's own cases.

The expected values are written here a second time, naively and in float64.
"""

import importlib
import itertools
import math

import pytest
import torch

from tokenmill.kernels import OPS

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (2e-3, 2e-3)}


def rms_norm(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(q, k, cos, sin):
    def rotate(x):
        out = x.double().clone()
        half = cos.shape[1]
        for i in range(half):
            pair = torch.complex(x[:, :, i].double(), x[:, :, i + half].double())
            turned = pair * torch.complex(cos[:, i].double(), sin[:, i].double())[:, None]
            out[:, :, i], out[:, :, i + half] = turned.real, turned.imag
        return out

    return rotate(q), rotate(k)


def silu_mul(x):
    gate, up = x.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def gelu_mul(x):
    gate, up = x.double().chunk(2, -1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def linear(x, weight, bias):
    out = torch.einsum("tk,nk->tn", x.double(), weight.double())
    return out if bias is None else out + bias.double()


def quantized(x):
    """int8 elements and float32 scales of keys or values [..., D]."""
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    return (x.double() / scale).round().to(torch.int8), scale.float()


def read(cache):
    if cache.dtype != torch.int8:
        return cache.double()
    return cache[..., :-4].double() * cache[..., -4:].clone().view(torch.float32).double()


def paged_attention(q, k_cache, v_cache, block_table, query_start, context_lens, scale, window, softcap):
    k_cache, v_cache = read(k_cache), read(v_cache)
    out = torch.zeros(q.shape, dtype=torch.float64)
    kv_heads, block_size = k_cache.shape[1:3]
    group = q.shape[1] // kv_heads
    for row, context in enumerate(context_lens.tolist()):
        first, end = query_start[row].item(), query_start[row + 1].item()
        for index in range(first, end):
            position = context - end + index
            start = 0 if window is None else max(0, position - window + 1)
            seen = range(start, position + 1)
            blocks = [block_table[row, p // block_size].item() for p in seen]
            offsets = [p % block_size for p in seen]
            for head in range(q.shape[1]):
                keys = k_cache[blocks, head // group, offsets].double()
                values = v_cache[blocks, head // group, offsets].double()
                scores = keys @ q[index, head].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[index, head] = scores.softmax(0) @ values
    return out


def kept_tokens(logits, temperature, top_k, top_p, min_p):
    """Ids and renormalised probabilities that one row's settings leave, in the order they are laid out on [0, 1)."""
    probabilities = (logits.double() / temperature).softmax(0)
    vocabulary = len(logits)
    if not (0 < top_k < vocabulary or top_p < 1 or min_p > 0):
        return list(range(vocabulary)), probabilities
    order = sorted(range(vocabulary), key=lambda token: (-probabilities[token].item(), token))
    if top_k > 0:
        order = order[:top_k]
    mass = sum(probabilities[token].item() for token in order)
    if top_p < 1:
        total, nucleus = 0.0, []
        for token in order:
            nucleus.append(token)
            total += probabilities[token].item()
            if total >= top_p * mass:
                break
        order = nucleus
    order = [token for token in order if probabilities[token] >= min_p * probabilities[order[0]]]
    return order, probabilities[order] / probabilities[order].sum()


def check_sample(actual, logits, temperature, top_k, top_p, min_p, uniform):
    assert actual.shape == (len(logits),)
    assert actual.dtype == torch.int64
    for row, token in enumerate(actual.tolist()):
        if temperature[row] == 0:
            assert token == logits[row].tolist().index(logits[row].max().item())
            continue
        settings = (temperature[row].double(), top_k[row].item(), top_p[row].item(), min_p[row].item())
        order, probabilities = kept_tokens(logits[row], *settings)
        assert token in order
        place = order.index(token)
        below = probabilities[:place].sum().item()
        assert probabilities[place] > 0
        assert below - 1e-5 <= uniform[row].item() <= below + probabilities[place].item() + 1e-5


def check_kv_write(caches, k, v, k_cache, v_cache, slots):
    for actual, before, new in zip(caches, (k_cache, v_cache), (k, v), strict=True):
        expected = before.clone()
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                block, offset = divmod(slot, before.shape[2])
                if before.dtype == torch.int8:
                    elements, scale = quantized(new[token])
                    expected[block, :, offset] = torch.cat((elements, scale.view(torch.int8)), -1)
                else:
                    expected[block, :, offset] = new[token]
        assert torch.equal(actual, expected)


def check_token_logprobs(actual, logits, tokens, k):
    own, rank, top_ids, top = actual
    expected = logits.double().log_softmax(-1)
    close(own, expected[torch.arange(len(tokens)), tokens])
    assert rank.tolist() == [sum(row > row[token]).item() + 1 for row, token in zip(logits, tokens, strict=True)]
    assert top_ids.shape == top.shape == (len(tokens), k)
    best = logits.double().sort(-1, descending=True).values[:, :k]
    assert torch.equal(logits.gather(1, top_ids).double(), best)
    assert all(len(set(row)) == k for row in top_ids.tolist())
    close(top, expected.gather(1, top_ids))


def check_penalize(mutated, logits, history, starts, prompt_lens, repetition, frequency, presence):
    (actual,), expected = mutated, logits.clone()
    for row, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
        known = history[begin:end].tolist()
        output = known[prompt_lens[row] :]
        for token in set(known):
            was = logits[row, token].double()
            now = was / repetition[row] if was > 0 else was * repetition[row]
            count = output.count(token)
            expected[row, token] = now - (count * frequency[row] + presence[row] if count else 0)
    close(actual, expected.double())


def close(actual, expected):
    rtol, atol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


def expect(naive):
    def check(actual, *arguments):
        expected = naive(*arguments)
        actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
        for got, want in zip(actual, expected, strict=True):
            assert got.shape == want.shape
            assert got.dtype == arguments[0].dtype
            close(got, want)

    return check


CHECKS = {
    "rms_norm": expect(rms_norm),
    "rope": expect(rope),
    "silu_mul": expect(silu_mul),
    "gelu_mul": expect(gelu_mul),
    "linear": expect(linear),
    "kv_write": check_kv_write,
    "paged_attention": expect(paged_attention),
    "penalize": check_penalize,
    "sample": check_sample,
    "token_logprobs": check_token_logprobs,
}
NAMED = {op.name: list(importlib.import_module(f"tokenmill.kernels.ops.{op.name}").cases()) for op in OPS}
MUTATED = {"kv_write": slice(2, 4), "penalize": slice(1)}
"""The arguments that an operation changes instead of returning something."""
CASES = {name: [arguments for _, arguments in cases] for name, cases in NAMED.items()}


def runs():
    for op in OPS:
        for implementation in op.implementations():
            for device in filter(implementation.serves, DEVICES):
                for case, arguments in NAMED[op.name]:
                    label = f"{op.name}-{implementation.source}-{device}-{case}"
                    yield pytest.param(op.name, implementation.function, device, arguments, id=label)


@pytest.mark.parametrize(("name", "function", "device", "arguments"), list(runs()))
def test_agrees_with_the_contract(name, function, device, arguments):
    there = [x.to(device, copy=True) if isinstance(x, torch.Tensor) else x for x in arguments]
    actual = function(*there)
    mutated = there[MUTATED[name]] if name in MUTATED else []
    results = mutated or actual
    CHECKS[name](results.cpu() if isinstance(results, torch.Tensor) else tuple(x.cpu() for x in results), *arguments)
    for before, after in zip(arguments, there, strict=True):
        if isinstance(before, torch.Tensor) and not any(after is x for x in mutated):
            torch.testing.assert_close(after.cpu(), before, rtol=0, atol=0, equal_nan=True)


def test_every_operation_is_checked():
    assert CHECKS.keys() == {op.name for op in OPS}
    assert all(len(cases) >= 5 for cases in CASES.values())


def test_attention_accuracy_in_bfloat16_is_that_of_its_rounding():
    arguments = dict(NAMED["paged_attention"])["bfloat16"]
    op = next(op for op in OPS if op.name == "paged_attention")
    error = op(*arguments).double() - paged_attention(*arguments)
    assert math.sqrt(error.square().mean().item()) < 2e-3
