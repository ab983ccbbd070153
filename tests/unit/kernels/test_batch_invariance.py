"""In float32 a row's result has the same bits whatever else is in the batch and however its prompt was cut."""

import pytest
import torch

from tokenmill import kernels

RANDOM = torch.Generator().manual_seed(7)


def randn(*shape):
    return torch.randn(*shape, generator=RANDOM)


def subsets(rows, count=8):
    """Rows alone, all of them in another order, and random selections."""
    yield from ([row] for row in (0, rows // 2, rows - 1))
    yield torch.randperm(rows, generator=RANDOM).tolist()
    for _ in range(count):
        size = int(torch.randint(1, rows + 1, (1,), generator=RANDOM))
        yield torch.randperm(rows, generator=RANDOM)[:size].tolist()


def assert_row_by_row(function, *columns):
    """`function` gives each row of the columns the same result in every subset of them."""
    whole = function(*columns)
    whole = whole if isinstance(whole, tuple) else (whole,)
    for rows in subsets(len(columns[0])):
        part = function(*(column[rows] for column in columns))
        part = part if isinstance(part, tuple) else (part,)
        assert all(torch.equal(some, every[rows]) for some, every in zip(part, whole, strict=True))


@pytest.mark.parametrize("width", [1, 37, 64, 1000, 4096])
def test_rms_norm(width):
    weight = randn(width)
    assert_row_by_row(lambda x: kernels.rms_norm(x, weight, 1e-6), randn(50, width))


@pytest.mark.parametrize("width", [1, 37, 96, 3072])
@pytest.mark.parametrize("op", [kernels.silu_mul, kernels.gelu_mul])
def test_gates(op, width):
    assert_row_by_row(op, randn(50, 2 * width) * 3)


def test_rope():
    angle = randn(50, 24) * 100
    assert_row_by_row(kernels.rope, randn(50, 6, 64), randn(50, 2, 64), angle.cos(), angle.sin())


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (33, 7), (64, 64), (64, 192), (257, 129), (1024, 512), (512, 2000)]
)
def test_linear(inputs, outputs):
    weight, bias = randn(outputs, inputs), randn(outputs)
    assert_row_by_row(lambda x: kernels.linear(x, weight, bias), randn(150, inputs))


def test_linear_of_a_strided_input():
    weight, x = randn(65, 100), randn(20, 300)
    assert torch.equal(kernels.linear(x[:, 100:200], weight, None), kernels.linear(x[:, 100:200].clone(), weight, None))


@pytest.mark.parametrize("vocabulary", [11, 1000, 20_001, 151_936])
def test_sample(vocabulary):
    rows = 24
    settings = torch.tensor(
        [[0.0, 0, 1, 0], [1, 0, 1, 0], [0.7, 20, 0.9, 0], [1.5, 0, 0.95, 0.01], [1, 0, 1, 0.1], [3, 3000, 0.99, 0]]
    ).repeat(rows // 6, 1)
    temperature, top_k, top_p, min_p = settings.unbind(1)
    logits = (randn(rows, vocabulary) * 3).bfloat16().float()  # rounded, so that there are many ties
    uniform = torch.rand(rows, generator=RANDOM, dtype=torch.float64)
    assert_row_by_row(kernels.sample, logits, temperature, top_k.long(), top_p, min_p, uniform)


def test_token_logprobs():
    tokens = torch.randint(0, 50_000, (12,), generator=RANDOM)
    assert_row_by_row(lambda *x: kernels.token_logprobs(*x, 5), randn(12, 50_000), tokens)


class Sequence:
    """The queries, keys and values of one sequence, and its blocks in a cache."""

    def __init__(self, length, heads, kv_heads, width, block_size, free_blocks):
        self.q = randn(length, heads, width)
        self.k, self.v = randn(length, kv_heads, width), randn(length, kv_heads, width)
        self.blocks = [free_blocks.pop() for _ in range(-(-length // block_size))]


def attend(sequences, chunks, caches, window, softcap):
    """Attention of one batch: for each (sequence, first, end) of `chunks` the queries of these positions."""
    longest = max(len(sequence.blocks) for sequence in sequences)
    table = torch.zeros(len(chunks), longest, dtype=torch.int32)
    starts, contexts, queries = [0], [], []
    for row, (index, first, end) in enumerate(chunks):
        blocks = sequences[index].blocks
        table[row, : len(blocks)] = torch.tensor(blocks)
        starts.append(starts[-1] + end - first)
        contexts.append(end)
        queries.append(sequences[index].q[first:end])
    q = torch.cat(queries)
    starts, contexts = (torch.tensor(x, dtype=torch.int32) for x in (starts, contexts))
    out = kernels.paged_attention(q, *caches, table, starts, contexts, 0.25, window, softcap)
    return [out[starts[row] : starts[row + 1]] for row in range(len(chunks))]


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 32), (1, 1, 8), (16, 8, 128), (3, 3, 40), (7, 1, 24)])
@pytest.mark.parametrize(("window", "softcap", "block_size"), [(None, None, 16), (50, None, 16), (None, 8.0, 7)])
def test_paged_attention(heads, kv_heads, width, window, softcap, block_size):
    lengths = [1, 17, 130, 300]
    free = torch.randperm(120, generator=RANDOM).tolist()
    sequences = [Sequence(length, heads, kv_heads, width, block_size, free) for length in lengths]
    caches = [torch.zeros(120, kv_heads, block_size, width) for _ in range(2)]
    for sequence in sequences:
        positions = torch.arange(len(sequence.q))
        slots = torch.tensor(sequence.blocks)[positions // block_size] * block_size + positions % block_size
        kernels.kv_write(sequence.k, sequence.v, *caches, slots)

    def run(chunks):
        return attend(sequences, chunks, caches, window, softcap)

    whole = run([(index, 0, length) for index, length in enumerate(lengths)])
    for index, length in enumerate(lengths):  # alone
        assert torch.equal(run([(index, 0, length)])[0], whole[index])
    decodes = [(index, length - 1, length) for index, length in enumerate(lengths)]
    for index, out in enumerate(run(decodes)):  # as a decode batch
        assert torch.equal(out, whole[index][-1:])
    for _ in range(6):  # chunks of random sequences at random places, in random order
        chunks = []
        for index in torch.randperm(len(lengths), generator=RANDOM).tolist():
            first, end = sorted(torch.randint(0, lengths[index] + 1, (2,), generator=RANDOM).tolist())
            chunks.append((index, first, max(end, first + 1)) if first < lengths[index] else (index, first - 1, first))
        for (index, first, end), out in zip(chunks, run(chunks), strict=True):
            assert torch.equal(out, whole[index][first:end])
