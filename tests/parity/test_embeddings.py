"""Embeddings are those of transformers' hidden states, and depend on the prompt alone."""

import json
import random
from array import array

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.llm import LLM
from tokenmill.testing import random_model
from tokenmill.types import EngineRequest, PoolingParams, SamplingParams

transformers = pytest.importorskip("transformers")

POOLINGS = [PoolingParams(), PoolingParams(pooling="mean"), PoolingParams(pooling="mean", normalize=False),
            PoolingParams(dimensions=16)]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model") / "qwen3")


def start(model, dtype="float32", chunk=512) -> LLM:
    values = {
        "model": {"model": str(model), "dtype": dtype, "max_model_len": 128},
        "cache": {"memory_gib": 0.01, "block_size": 16 if dtype == "bfloat16" else 8},
        "scheduler": {"max_num_batched_tokens": chunk},
    }
    return LLM(config=build(EngineConfig, values))


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(250) for _ in range(length)]


def expected(model, tokens: list[int], pooling: PoolingParams, dtype=torch.float32) -> np.ndarray:
    theirs = transformers.AutoModel.from_pretrained(model, dtype=dtype, attn_implementation="eager").eval()
    with torch.inference_mode():
        states = theirs(torch.tensor([tokens])).last_hidden_state[0].double()
    pooled = (states[-1] if pooling.pooling == "last" else states.mean(0))[: pooling.dimensions]
    return (pooled / pooled.norm() if pooling.normalize else pooled).numpy()


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_an_embedding_is_made_of_the_states_that_transformers_computes(model, pooling):
    tokens = prompt(1, 70)
    llm = start(model, chunk=32)
    (output,) = llm.embed([tokens], pooling)
    np.testing.assert_allclose(output.embedding, expected(model, tokens, pooling), atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pooling", POOLINGS[:2], ids=str)
def test_an_embedding_is_bit_equal_in_any_company(model, dtype, pooling):
    target = prompt(1, 75)
    alone = start(model, dtype).embed([target], pooling)[0].embedding
    for chunk in (7, 16, 33, 64):
        llm = start(model, dtype, chunk)
        crowd = [prompt(seed, 5 + 9 * seed) for seed in range(2, 9)]
        together = llm.embed([*crowd, target], pooling)
        assert together[-1].embedding == alone, f"chunks of {chunk}"
        again = llm.embed([target], pooling)[0]
        assert again.embedding == alone, "what is cached"
        assert (again.cached_tokens > 0) == (pooling.pooling == "last")


def test_an_embedding_beside_completions_is_the_same(model):
    target = prompt(1, 75)
    alone = start(model).embed([target])[0].embedding
    engine = start(model, chunk=16).engine
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for seed in range(2, 5):
        engine.add(
            EngineRequest(request_id=str(seed), prompt_token_ids=prompt(seed, 10 * seed), params=params, arrival=0.0)
        )
    engine.step()
    engine.add(
        EngineRequest(request_id="e", prompt_token_ids=target, params=params, arrival=0.0, pooling=PoolingParams())
    )
    outputs = [output for _ in range(30) for output in engine.step() if output.request_id == "e"]
    assert [array("f", output.embedding) for output in outputs] == [alone]
    assert engine.has_work  # the completions went on beside it


def test_a_model_that_was_saved_without_its_head_is_the_same(model, tmp_path):
    """As Qwen3-Embedding is: the names of its tensors do not begin with ``model.``."""
    for file in model.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = prompt(3, 20)
    assert start(tmp_path).embed([tokens])[0].embedding == start(model).embed([tokens])[0].embedding


def test_the_models_own_files_say_how(model, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"}
               for path, kind in (("", "Transformer"), ("1_Pooling", "Pooling"))]  # fmt: skip
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    said = {"word_embedding_dimension": 48, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    tokens = prompt(4, 20)
    (output,) = start(tmp_path).embed([tokens])
    way = PoolingParams(pooling="mean", normalize=False)
    np.testing.assert_allclose(output.embedding, expected(model, tokens, way), atol=2e-5)
