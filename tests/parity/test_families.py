"""Every family computes what transformers computes, on tiny random models, however the work is cut up."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill.models import loader
from tokenmill.models.batch import ForwardBatch, KVCache
from tokenmill.models.decoder import Decoder
from tokenmill.models.family import FAMILIES
from tokenmill.models.spec import kv_layout

transformers = pytest.importorskip("transformers")

BLOCK_SIZE = 4
LENGTH = 29
VOCABULARY = 97

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THETA = {"rope_theta": 500.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, **THETA}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.2, 1.9, 2.5, 4.0],
    "partial_rotary_factor": 0.5,
    **THETA,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 11, "sliding_window": 7, "final_logit_softcapping": 2.0}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, **THETA},
}

# Family, what the case adds, and the changes to COMMON.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, **THETA}}),
    "llama_yarn": ("llama", {"rope_parameters": YARN, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 7, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "mistral_unlimited": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "phi3": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "hidden_size": 96, "sliding_window": 11},
    ),
    "phi3_plain": ("phi3", {"rope_parameters": {"rope_type": "default", **THETA}}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 1.0}),
    "gemma3_text": (
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 7, "sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPE},
    ),
    "olmo2": ("olmo2", {"attention_bias": True}),
}


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES.values()} == set(FAMILIES.names())


@dataclass
class Sequence_:
    """A sequence with its own block tables."""

    tokens: list[int]
    tables: list[list[int]]
    computed: int = 0


@dataclass
class Session:
    """Our decoder with a cache whose blocks are handed out in a random order; block 0 is full of NaN."""

    decoder: Decoder
    cache: KVCache = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.layout = kv_layout(self.decoder.spec, BLOCK_SIZE, self.decoder.dtype.itemsize)
        blocks = 1 + 6 * len(self.layout.groups) * (LENGTH // BLOCK_SIZE + 2)
        self.cache = self.decoder.new_cache(self.layout, blocks)
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor[0] = float("nan")
        self.free = list(range(1, blocks))
        random.Random(0).shuffle(self.free)

    def start(self, tokens: list[int], prefix: Sequence_ | None = None, shared: int = 0) -> Sequence_:
        """A sequence; its first `shared` tokens are found in the blocks of `prefix`."""
        assert shared % BLOCK_SIZE == 0
        tables = [table[: shared // BLOCK_SIZE] for table in prefix.tables] if prefix else [[] for _ in self.groups]
        return Sequence_(tokens, tables, shared)

    @property
    def groups(self) -> range:
        return range(len(self.layout.groups))

    def step(self, work: Sequence[tuple[Sequence_, int]], padding: int = 0) -> list[Tensor]:
        """Computes the next n tokens of each sequence; returns the logits of each, [n, vocabulary]."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[list[int]] = [[] for _ in self.groups]
        for sequence, count in work:
            span = range(sequence.computed, sequence.computed + count)
            tokens += [sequence.tokens[position] for position in span]
            positions += span
            for group, table in enumerate(sequence.tables):
                while len(table) * BLOCK_SIZE < span.stop:
                    table.append(self.free.pop())
                window = self.layout.groups[group].window
                if window is not None:  # forget what no query of this step sees, as a cache manager would
                    for index in range(max(0, span.start - window + 1) // BLOCK_SIZE):
                        table[index] = 0
                slots[group] += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
            sequence.computed = span.stop
        longest = max(len(table) for sequence, _ in work for table in sequence.tables)
        counts = [count for _, count in work]
        batch = ForwardBatch(
            token_ids=torch.tensor(tokens + [0] * padding),
            positions=torch.tensor(positions + [0] * padding),
            slots=tuple(torch.tensor(group + [-1] * padding) for group in slots),
            block_tables=tuple(
                torch.tensor(
                    [s.tables[group] + [0] * (longest - len(s.tables[group])) for s, _ in work], dtype=torch.int32
                )
                for group in self.groups
            ),
            query_start=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            context_lens=torch.tensor([sequence.computed for sequence, _ in work], dtype=torch.int32),
        )
        hidden = self.decoder.forward(batch, self.cache)
        assert hidden.shape == (len(tokens) + padding, self.decoder.spec.hidden_size)
        logits = self.decoder.logits(hidden[: len(tokens)])
        assert logits.dtype == torch.float32
        return list(logits.split(counts))


def randomize(model: Any) -> None:
    """Gives norms and biases values that matter: a fresh model has ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.3 if "norm" in name else 0.5))


@dataclass(frozen=True)
class Pair:
    """The same model twice."""

    theirs: Any
    path: Path

    def expected(self, tokens: Sequence[int]) -> Tensor:
        """Their logits, [T, vocabulary] float32."""
        with torch.inference_mode():
            return self.theirs(torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


def build(case: str, path: Path) -> Pair:
    family, changes = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(theirs)
    theirs.save_pretrained(path)
    return Pair(theirs, path)


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def session(pair: Pair) -> Session:
    return Session(loader.load(pair.path))


def random_tokens(seed: int, count: int = LENGTH) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCABULARY) for _ in range(count)]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.05, "the reference is degenerate, so agreement would mean nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_whole_prefill(pair: Pair, session: Session) -> None:
    tokens = random_tokens(0)
    (logits,) = session.step([(session.start(tokens), LENGTH)])
    assert_close(logits, pair.expected(tokens))


def test_token_by_token(pair: Pair, session: Session) -> None:
    tokens = random_tokens(1)
    sequence = session.start(tokens)
    logits = torch.cat([session.step([(sequence, 1)])[0] for _ in tokens])
    assert_close(logits, pair.expected(tokens))


def test_chunks_after_a_prefix_in_the_cache(pair: Pair, session: Session) -> None:
    first, shared = random_tokens(2), 12
    second = first[:shared] + random_tokens(3, LENGTH - shared)
    owner = session.start(first)
    session.step([(owner, shared)])
    guest = session.start(second, owner, shared)
    chunks = [session.step([(guest, count)])[0] for count in (5, 1, 9, 2)]
    assert_close(torch.cat(chunks), pair.expected(second)[shared:])


def test_a_ragged_batch(pair: Pair, session: Session) -> None:
    """Prefill, decode and a chunk in one batch with padding give each row what it gets alone."""
    new, decoding, chunked = (session.start(random_tokens(seed)) for seed in (4, 5, 6))
    session.step([(decoding, 17), (chunked, 3)])
    logits = session.step([(new, 8), (decoding, 1), (chunked, 10)], padding=5)
    for ours, sequence, span in zip(logits, (new, decoding, chunked), ((0, 8), (17, 18), (3, 13)), strict=True):
        assert_close(ours, pair.expected(sequence.tokens)[slice(*span)])


def test_bfloat16_is_as_close_to_the_truth_as_theirs(pair: Pair) -> None:
    tokens = random_tokens(7)
    truth = pair.expected(tokens)
    rounded = Pair(
        transformers.AutoModelForCausalLM.from_pretrained(
            pair.path, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval(),
        pair.path,
    )
    their_error = (rounded.expected(tokens) - truth).square().mean().sqrt()
    session = Session(loader.load(pair.path, "bfloat16"))
    (logits,) = session.step([(session.start(tokens), LENGTH)])
    our_error = (logits - truth).square().mean().sqrt()
    assert our_error < 1.5 * their_error
    assert our_error < 0.1 * truth.std()


def test_longrope_uses_the_short_factors_for_short_contexts(tmp_path: Path) -> None:
    pair = build("phi3", tmp_path)
    session = Session(loader.load(pair.path, max_model_len=16))
    tokens = random_tokens(8, 16)
    (logits,) = session.step([(session.start(tokens), 16)])
    assert_close(logits, pair.expected(tokens))


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    pair = build("gemma2", tmp_path / "whole")
    pair.theirs.save_pretrained(tmp_path / "parts", max_shard_size="40kB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    session = Session(loader.load(tmp_path / "parts"))
    tokens = random_tokens(9)
    (logits,) = session.step([(session.start(tokens), LENGTH)])
    assert_close(logits, pair.expected(tokens))


@pytest.mark.parametrize("family", FAMILIES.names())
def test_what_a_configuration_leaves_out_means_the_same(family: str) -> None:
    said = COMMON | {"num_hidden_layers": 7}
    theirs = transformers.AutoConfig.for_model(family, **said).to_dict()
    spec = FAMILIES.get(family).spec
    assert spec({"model_type": family, **said}) == spec(theirs)
