"""An answer depends on its request alone: bit-equal log probabilities whatever happens around it.

In float32 through the reference operators, and in bfloat16 and whole numbers through the native kernels where they are
built.
"""

import random

import msgspec
import pytest

from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.executor import LocalExecutor
from tokenmill.testing import random_model
from tokenmill.types import EngineRequest, SamplingParams

BLOCK = {"float32": 8, "bfloat16": 16}
ROUNDING = {
    "none": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int4 times bf16": {"quantize": "int4", "quantize_head": "int4", "activations": "bf16"},
}
FORMATS = [
    ("float32", "none", "auto"),
    ("float32", "int8", "auto"),
    ("float32", "int4 times bf16", "auto"),
    ("float32", "none", "int8"),
    *(("bfloat16", quantize, "auto") for quantize in ROUNDING),
    ("bfloat16", "none", "int8"),
]
"""Types of the model, how its weights are rounded, and of its KV."""
TOKENS = 24
PROMPT = 75


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / request.param
    if request.param == "qwen3":
        return random_model(folder)
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=260, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=20, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"] * 2, eos_token_id=257,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def serve(
    model,
    requests,
    *,
    dtype,
    quantize,
    kv="auto",
    threads=1,
    chunk=512,
    caching=True,
    late=(),
    preempt_at=-1,
    **scheduler,
):
    """Serves requests together and returns {id: (tokens, every log probability)} and the engine."""
    config = build(
        EngineConfig,
        {
            "model": {
                "model": str(model),
                "dtype": dtype,
                **ROUNDING[quantize],
                "threads": threads,
                "max_model_len": 128,
            },
            "cache": {"block_size": BLOCK[dtype], "prefix_caching": caching, "memory_gib": 0.01, "kv_dtype": kv},
            "scheduler": {
                "max_num_seqs": 16,
                "max_num_batched_tokens": chunk,
                "starvation_s": 1e9,
                **scheduler,
            },
        },
    )
    engine = Engine(config, LocalExecutor(config))
    results = {}
    for request in requests:
        engine.add(request)
    pending = list(late)
    while engine.has_work or pending:
        if engine.events.step == preempt_at:
            engine.scheduler.preempt(engine.scheduler.running["target"], "the test")
        for output in engine.step():
            tokens, logprobs = results.setdefault(output.request_id, ([], []))
            tokens += output.token_ids
            logprobs += [entry.logprobs for entry in output.logprobs or []]
        if pending and engine.events.step % 3 == 0:
            engine.add(pending.pop())
    return results, engine


def request(name: str, seed: int, length: int = PROMPT, stem: int = 0, temperature: float = 0.0) -> EngineRequest:
    rng, common = random.Random(seed), random.Random(99)
    prompt = [common.randrange(250) for _ in range(stem)] + [rng.randrange(250) for _ in range(length - stem)]
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=TOKENS, ignore_eos=True, logprobs=20)
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=params, arrival=0.0)


def crowd(count: int, stem: int = 0) -> list[EngineRequest]:
    return [request(f"other-{i}", 100 + i, 5 + 9 * i % 90, min(stem, 5 + 9 * i % 90)) for i in range(count)]


@pytest.mark.parametrize(("dtype", "quantize", "kv"), FORMATS)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "seeded"])
def test_an_answer_is_bit_equal_in_any_company(model, dtype, quantize, kv, temperature):
    def serve_all(requests, **options):
        return serve(model, requests, dtype=dtype, quantize=quantize, kv=kv, **options)

    target = request("target", 1, stem=40, temperature=temperature)
    alone, _ = serve_all([target])
    expected = alone["target"]
    assert len(expected[0]) == TOKENS

    in_batch, _ = serve_all([*crowd(9), target], late=crowd(14)[9:])
    assert in_batch["target"] == expected, "batch composition"

    for threads in (1, 2):
        shared, _ = serve_all([*crowd(5), target], threads=threads, chunk=64)
        assert shared["target"] == expected, f"{threads} threads"

    for chunk in (1, 7, 16, 33):
        chunked, _ = serve_all([*crowd(3), target], chunk=chunk)
        assert chunked["target"] == expected, f"chunks of {chunk}"

    first = request("first", 2, stem=40, temperature=temperature)
    hit, engine = serve_all([first], late=[target])
    assert engine.stats().prefix_hits == 40 // BLOCK[dtype] * BLOCK[dtype]
    assert hit["target"] == expected, "cache hit"

    again, engine = serve_all([msgspec.structs.replace(target, request_id="twin")], late=[target])
    assert engine.stats().prefix_hits > 0
    assert again["target"] == expected, "whole prompt cached"

    for caching in (True, False):
        again, engine = serve_all([*crowd(3), target], preempt_at=9, caching=caching, chunk=64)
        assert engine.stats().recomputed_tokens > 0
        assert again["target"] == expected, "preemption"

    padded, engine = serve_all([target, *crowd(4)], batching="static")
    assert engine.stats().padded_tokens > 0
    assert padded["target"] == expected, "padded batch"
