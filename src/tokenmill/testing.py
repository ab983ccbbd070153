"""Fakes and contract checks, shipped so that a plugin's author can run what we run.

`FakeExecutor` needs no model and no torch. It keeps a picture of KV memory and checks every plan against it: a block
that is shared wrongly, freed too early or not copied before a write shows as an `AssertionError` on the very step.
"""

from __future__ import annotations

import itertools
import json
import random
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.memory import ModelFacts
from tokenmill.engine.plan import PlannedRow, PoolRow, RowResult, StepPlan, StepResult
from tokenmill.engine.request import PREPARED
from tokenmill.models.spec import KVGroup, KVLayout
from tokenmill.types import EngineOutput, EngineRequest, FinishReason, PoolingParams, SamplingParams

__all__ = [
    "FakeClock",
    "FakeExecutor",
    "check_no_starvation",
    "check_policy",
    "byte_tokenizer",
    "fake_facts",
    "random_traffic",
    "random_model",
]


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def fake_facts(
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 64,
    windows: Sequence[int | None] = (None,),
    vocab_size: int = 100,
) -> ModelFacts:
    """Facts of a model with one layer per entry of `windows`. Token 0 ends a text."""
    groups = tuple(KVGroup(window, (layer,)) for layer, window in enumerate(windows))
    layout = KVLayout(groups, block_size, block_bytes=2 * block_size * 4, kv_heads=1, head_dim=1, buffers=1)
    return ModelFacts(layout, num_blocks, max_model_len, vocab_size, hidden_size=8, eos_ids=(0,))


class FakeExecutor:
    """Computes plans without a model and checks them against a picture of KV memory.

    Args:
        next_token: chooses a token from the whole history; by default a fixed mix of it that is never 0.
        clock: advanced by the cost of each step, if given.
        seconds_per_token: that cost.
    """

    def __init__(
        self,
        facts: ModelFacts,
        next_token: Callable[[Sequence[int]], int] | None = None,
        clock: FakeClock | None = None,
        seconds_per_token: float = 0.001,
    ) -> None:
        self.facts = facts
        self.steps: list[StepPlan] = []
        self.fail_next: Exception | None = None
        """Raised by the next step instead of computing it."""
        self._next_token = next_token or (lambda history: 1 + hash(tuple(history)) % (facts.vocab_size - 1))
        self._clock = clock
        self._seconds = seconds_per_token
        self._memory: dict[int, dict[int, tuple[int, int, int]]] = {}

    def prepare(self, params: SamplingParams) -> Future[Any]:
        return PREPARED

    def execute(self, plan: StepPlan) -> StepResult:
        self.steps.append(plan)
        if self._clock is not None:
            self._clock.advance(self._seconds * (plan.tokens + plan.padding))
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        for source, destination in plan.copies:
            self._memory[destination] = dict(self._memory.get(source, {}))
        for row in plan.rows:
            self._write(row)
        return StepResult(plan.step, tuple(self._read(row) for row in plan.rows))

    def _write(self, row: PlannedRow) -> None:
        size = self.facts.layout.block_size
        for group, table in enumerate(row.tables):
            for position, token in enumerate(row.tokens, row.start):
                block = table[position // size]
                assert block != 0, f"{row.request_id} writes position {position} to the null block"
                self._memory.setdefault(block, {})[position % size] = (group, position, token)

    def _read(self, row: PlannedRow) -> RowResult:
        """Checks that all KV the row's queries can see is what the row itself would have written."""
        size = self.facts.layout.block_size
        end = row.start + len(row.tokens)
        history = row.sample.history if row.sample else None
        for group, spec in enumerate(self.facts.layout.groups):
            first = 0 if spec.window is None else max(0, row.start - spec.window + 1)
            for position in range(first, end):
                found = self._memory.get(row.tables[group][position // size], {}).get(position % size)
                assert found is not None, f"{row.request_id} reads position {position}, which nobody wrote"
                assert found[:2] == (group, position), f"{row.request_id} reads another's block at {position}"
                expected = history[position] if history is not None else None
                assert expected is None or found[2] == expected, f"{row.request_id} reads a wrong token at {position}"
        if row.pool is not None:
            return RowResult(pooled=self._pool(row, row.pool), ended=FinishReason.STOP if row.pool.last else None)
        if row.sample is None:
            return RowResult()
        assert end == len(row.sample.history), "a row samples before its known tokens are computed"
        return RowResult((self._next_token(row.sample.history),))

    def _pool(self, row: PlannedRow, pool: PoolRow) -> bytes:
        """Instead of an embedding the tokens that it is made of, so that a test sees each once."""
        seen = pool.total + array("q", row.tokens).tobytes()
        return seen if pool.params.pooling == "mean" or pool.last else b""


def random_traffic(seed: int, count: int, facts: ModelFacts, tenants: int = 3) -> list[EngineRequest]:
    """Requests with random prompts, of which many share a beginning, and random limits. Arrival times are 0.

    Some want an embedding of their prompt.
    """
    rng = random.Random(seed)
    stems = [[rng.randrange(1, facts.vocab_size) for _ in range(facts.max_model_len)] for _ in range(3)]
    requests = []
    for number in range(count):
        length = rng.randint(1, facts.max_model_len * 3 // 4)
        shared = rng.randint(0, length)
        prompt = rng.choice(stems)[:shared] + [rng.randrange(1, facts.vocab_size) for _ in range(length - shared)]
        requests.append(
            EngineRequest(
                request_id=f"r{number}",
                prompt_token_ids=prompt,
                params=SamplingParams(max_tokens=rng.randint(1, facts.max_model_len // 2)),
                arrival=0.0,
                priority=rng.randint(-2, 2),
                tenant=f"tenant-{rng.randrange(tenants)}",
                cache_salt=rng.choice(["", "", "salt"]),
                deadline=rng.choice([None, rng.random() * 100]),
                pooling=rng.choice([None, None, None, PoolingParams(), PoolingParams(pooling="mean")]),
            )
        )
    return requests


def check_policy(config: EngineConfig, seed: int = 0, requests: int = 60) -> list[EngineOutput]:
    """Runs random traffic in a tiny pool under the policy and batching mode of `config`.

    Asserts that every request ends exactly once, that no step exceeds the token budget, and that every block is free at
    the end.

    Returns:
        The final outputs, in the order in which the requests ended.
    """
    clock = FakeClock()
    facts = fake_facts(num_blocks=40, max_model_len=64, windows=(None, 8))
    executor = FakeExecutor(facts, clock=clock)
    engine = Engine(config, executor, clock)
    pending = random_traffic(seed, requests, facts)
    pending.reverse()
    ended: list[EngineOutput] = []
    steps = 0
    while pending or engine.has_work:
        for _ in range(min(len(pending), 1 + steps % 3)):
            engine.add(msgspec.structs.replace(pending.pop(), arrival=clock.now))
        ended += _finals(engine, clock)
        steps += 1
        assert steps < 200 * requests, "requests starve"
    names = [output.request_id for output in ended]
    assert sorted(names) == sorted(f"r{number}" for number in range(requests)), "a request ended twice or never"
    budget = config.scheduler.max_num_batched_tokens
    assert all(plan.tokens <= budget for plan in executor.steps), "a step exceeded the token budget"
    assert engine.stats().blocks_used == 0, "blocks leaked"
    return ended


def check_no_starvation(config: EngineConfig, steps: int = 3000) -> None:
    """Asserts that the least attractive request ends although more attractive ones keep arriving faster than they end.

    `config.scheduler.starvation_s` bounds how long a policy may pass over a request; one fake step takes some
    milliseconds.
    """
    clock = FakeClock()
    facts = fake_facts(num_blocks=40, max_model_len=64)
    engine = Engine(config, FakeExecutor(facts, clock=clock), clock)
    short = SamplingParams(max_tokens=2)
    # Rivals share a cached prompt, have the higher priority, the earlier deadline, less to do, and a new tenant each.
    rivals = (
        EngineRequest(
            request_id=f"rival-{number}", prompt_token_ids=[1] * 8, params=short, arrival=0.0, priority=9,
            deadline=0.0, tenant=f"tenant-{number}",
        )
        for number in itertools.count()
    )  # fmt: skip
    for _ in range(20):
        engine.add(msgspec.structs.replace(next(rivals), arrival=clock.now))
    victim = EngineRequest(
        request_id="victim", prompt_token_ids=[2] * 40, params=SamplingParams(max_tokens=20), arrival=clock.now,
        priority=-9, tenant="tenant-0",
    )  # fmt: skip
    engine.add(victim)
    for _ in range(steps):
        finals = _finals(engine, clock)
        if any(output.request_id == "victim" for output in finals):
            return
        for _ in range(len(finals) + 1):
            if engine.stats().waiting < 200:
                engine.add(msgspec.structs.replace(next(rivals), arrival=clock.now))
    raise AssertionError(f"a request starved for {steps} steps")


def _finals(engine: Engine, clock: FakeClock) -> list[EngineOutput]:
    """One step; the outputs of requests that ended in it. Time passes also when nothing could run."""
    before = engine.events.step
    outputs = engine.step()
    if engine.events.step == before:
        clock.advance(0.01)
    return [output for output in outputs if output.finish_reason is not None]


def random_model(folder: Path, seed: int = 0, dtype: str = "float32", **overrides: object) -> Path:
    """Writes a random Qwen3 model, tiny unless overridden, with a byte tokenizer and chat template; returns
    `folder`.

    Args:
        dtype: of the stored weights, ``float32`` or ``bfloat16``.
        overrides: entries of config.json to change.
    """
    import torch
    from safetensors.torch import save_file

    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 260, "hidden_size": 48,
        "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False, "torch_dtype": dtype,
    }  # fmt: skip
    config |= overrides
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, kv_heads, dim = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (heads * dim, hidden),
            prefix + "self_attn.k_proj.weight": (kv_heads * dim, hidden),
            prefix + "self_attn.v_proj.weight": (kv_heads * dim, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, heads * dim),
            prefix + "self_attn.q_norm.weight": (dim,),
            prefix + "self_attn.k_norm.weight": (dim,),
            prefix + "mlp.gate_proj.weight": (config["intermediate_size"], hidden),
            prefix + "mlp.up_proj.weight": (config["intermediate_size"], hidden),
            prefix + "mlp.down_proj.weight": (hidden, config["intermediate_size"]),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    weights = {
        name: (torch.randn(shape, generator=generator) * (1.4 * hidden**-0.5 if len(shape) == 2 else 0.1)).to(
            getattr(torch, dtype)
        )
        + (1 if len(shape) == 1 else 0)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257]}))
    byte_tokenizer(folder)
    return folder


def byte_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with one token per byte (ids 0-255) and <|endoftext|>, <|im_end|>, <|im_start|> after them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template})
    )
