"""What every model family owes the loader."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tokenmill.models.families as folder
from tokenmill.models.family import FAMILIES
from tokenmill.models.spec import kv_layout, parameters, weight_shapes

CONFIG: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
}

families = pytest.mark.parametrize("name", FAMILIES.names())


@families
def test_the_weight_map_fills_every_tensor_exactly(name: str) -> None:
    """Rows that go into a fused tensor are all of its rows, each once; nothing is left empty."""
    family = FAMILIES.get(name)
    spec = family.spec({"model_type": name, **CONFIG})
    parts: dict[str, list[str]] = {}
    for into in family.weights.values():
        if into is not None:
            parts.setdefault(into.target, []).append(into.part)
    for target in weight_shapes(spec):
        pattern = re.sub(r"\.\d+\.", ".{}.", target)
        assert sorted(parts[pattern]) in ([""], ["k", "q", "v"], ["gate", "up"]), target


@families
def test_the_description_is_the_models_own(name: str) -> None:
    spec = FAMILIES.get(name).spec({"model_type": name, **CONFIG})
    assert spec.model_type == name
    assert len(spec.layers) == 6
    assert parameters(spec) > 0
    assert hash(spec) == hash(FAMILIES.get(name).spec({"model_type": name, **CONFIG}))
    groups = kv_layout(spec, 16, 2).groups
    assert sorted(layer for group in groups for layer in group.layers) == list(range(6))


@families
def test_the_configuration_is_not_changed(name: str) -> None:
    config = {"model_type": name, **CONFIG}
    before = json.dumps(config)
    FAMILIES.get(name).spec(config)
    assert json.dumps(config) == before


@families
def test_a_family_is_short_and_only_data(name: str) -> None:
    lines = (Path(next(iter(folder.__path__))) / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 80


def test_describing_models_needs_no_torch() -> None:
    code = (
        "import sys; from tokenmill.models.family import FAMILIES; "
        "[FAMILIES.get(name) for name in FAMILIES.names()]; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
