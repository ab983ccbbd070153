"""Reading configurations: the newer and the older spelling, defaults, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tokenmill.errors import ModelError
from tokenmill.models.family import FAMILIES, Into, offset_norms
from tokenmill.models.rope import Linear, Llama3, LongRope, RopeSpec, Unscaled, Yarn
from tokenmill.models.spec import ModelSpec

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def read(model_type: str, **changes: Any) -> ModelSpec:
    config = {"model_type": model_type} | BASE | changes
    return FAMILIES.get(model_type).spec({key: value for key, value in config.items() if value != "absent"})


def rope_of(spec: ModelSpec, layer: int = 0) -> RopeSpec:
    return spec.layers[layer].attention.rope


def window_of(spec: ModelSpec) -> list[int | None]:
    return [layer.attention.window for layer in spec.layers]


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SPELLINGS = {
    "default": ({"rope_type": "default"}, None, Unscaled()),
    "linear": ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}, Linear(2.0)),
    "llama3": ({"rope_type": "llama3", **LLAMA3}, {"rope_type": "llama3", **LLAMA3}, Llama3(8.0, 1.0, 4.0, 32)),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        Yarn(4.0, 16, 0.1 * math.log(4) + 1),
    ),
}


@pytest.mark.parametrize(("new", "old", "scaling"), SPELLINGS.values(), ids=SPELLINGS)
def test_both_spellings_of_rope_mean_the_same(new: dict[str, Any], old: dict[str, Any] | None, scaling: object) -> None:
    modern = read("llama", rope_parameters={"rope_theta": 5e5, **new})
    older = read("llama", rope_theta=5e5, rope_scaling=old)
    assert modern == older
    assert rope_of(modern) == RopeSpec(5e5, 16, scaling)  # type: ignore[arg-type]


def test_longrope_takes_its_sharpness_from_how_far_it_stretches() -> None:
    lists = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    spec = read(
        "phi3",
        rope_scaling={"type": "su", **lists},
        partial_rotary_factor=0.75,
        original_max_position_embeddings=16,
    )
    rope = rope_of(spec)
    assert (rope.theta, rope.dim) == (10000.0, 12)
    assert isinstance(rope.scaling, LongRope)
    assert rope.scaling.original_max_position == 16
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))


def test_yarn_with_both_mscales_divides_them() -> None:
    scaling = {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert rope_of(read("llama", rope_scaling=scaling)).attention_factor == 1.0


def test_gemma3_reads_its_released_configuration_as_the_newer_one() -> None:
    released = read(
        "gemma3_text",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window=32,
        sliding_window_pattern=3,
    )
    newer = read(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        sliding_window=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    assert released == newer
    assert window_of(released) == [32, 32, None] * 2
    assert rope_of(released, 0) == RopeSpec(1e4, 256)
    assert rope_of(released, 2) == RopeSpec(1e6, 256, Linear(8.0))


def test_gemma_scales_its_embedding_and_ties_its_head_unless_told_otherwise() -> None:
    spec = read("gemma2")
    assert spec.tied_head
    assert spec.embedding_scale == 8.0
    assert (spec.logit_softcap, spec.layers[0].attention.softcap) == (30.0, 50.0)
    assert window_of(spec) == [4096, None] * 3
    assert not read("gemma2", tie_word_embeddings=False).tied_head
    assert read("gemma2", final_logit_softcapping=None).logit_softcap is None


def test_mistral_without_a_word_on_windows_has_the_first_releases() -> None:
    assert window_of(read("mistral")) == [4096] * 6
    assert window_of(read("mistral", sliding_window=None)) == [None] * 6


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_uses_its_window_only_when_told_and_only_in_upper_layers(family: str) -> None:
    said = {"sliding_window": 32, "max_window_layers": 4}
    assert window_of(read(family, use_sliding_window=False, **said)) == [None] * 6
    assert window_of(read(family, use_sliding_window=True, **said)) == [None] * 4 + [32] * 2


def test_head_size_comes_from_the_hidden_size_unless_given() -> None:
    assert read("llama").layers[0].attention.head_dim == 16
    assert read("llama", head_dim=None).layers[0].attention.head_dim == 16
    assert read("llama", head_dim=24).layers[0].attention.scale == 24**-0.5
    assert read("qwen3").layers[0].attention.head_dim == 128


def test_without_key_heads_every_head_has_its_own() -> None:
    assert read("llama", num_key_value_heads="absent").layers[0].attention.kv_heads == 4


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ("llama", {"hidden_act": "relu"}, "hidden_act"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("qwen2", {"layer_types": ["linear_attention"] * 6}, "layer_types"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_scaling",
        ),
    ],
)
def test_what_does_not_exist_here_is_refused_with_the_reason(family: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(family, **changes)
    assert (caught.value.code, caught.value.field) == ("unsupported_model", field)


@pytest.mark.parametrize("family", FAMILIES.names())
@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"])
def test_a_configuration_that_lacks_something_is_an_error_that_names_it(family: str, key: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(family, **{key: "absent"})
    assert (caught.value.code, caught.value.field) == ("checkpoint_mismatch", key)


def test_a_scaling_without_its_factor_names_the_factor() -> None:
    with pytest.raises(ModelError) as caught:
        read("llama", rope_scaling={"type": "linear"})
    assert caught.value.field == "factor"


def test_layer_types_of_another_length_are_an_error() -> None:
    with pytest.raises(ModelError) as caught:
        read("gemma2", layer_types=["full_attention"] * 5)
    assert caught.value.code == "checkpoint_mismatch"


def test_offset_reaches_norms_alone() -> None:
    weights = {"a": Into("layers.{}.attention_norm"), "b": Into("layers.{}.mlp.down"), "c": None}
    assert offset_norms(weights, 1.0) == {**weights, "a": Into("layers.{}.attention_norm", offset=1.0)}
