from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tokenmill.errors import ModelError
from tokenmill.quant.scheme import FORMATS, Rounding, Scheme, read_scheme

W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


def compressed(format: str = "pack-quantized", weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": W4 | (weights or {})}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups} | more


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, Scheme("gptq", 4, 128, True)),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
            Scheme("gptq_v2", 8, 0, False),
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "GEMM"},
            Scheme("awq", 4, 64, False),
        ),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}, Scheme("awq", 4, 128, False)),
        (compressed(), Scheme("pack-quantized", 4, 128, True)),
        (
            compressed(weights={"symmetric": False, "group_size": 32, "actorder": None}),
            Scheme("pack-quantized", 4, 32, False),
        ),
        (
            compressed(weights={"num_bits": 8, "strategy": "channel", "group_size": None}),
            Scheme("pack-quantized", 8, 0, True),
        ),
        (
            compressed("int-quantized", {"num_bits": 8, "strategy": "channel", "group_size": None}),
            Scheme("int-quantized", 8, 0, True),
        ),
    ],
)
def test_each_dialect_is_read(said: dict[str, Any], meant: Scheme) -> None:
    assert read_scheme(said) == meant


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({}, "quant_method None"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "3 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 48}, "groups of 48"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:x": {}}}, "dynamic"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "4 bits"),
        (compressed("nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
        (compressed(weights={"type": "float"}), "'float'"),
        (compressed(weights={"strategy": "tensor"}), "per tensor"),
        (compressed("int-quantized"), "int-quantized"),
        (compressed(transform_config={"R1": {}}), "rotated"),
        (compressed(sparsity_config={"format": "dense"}), "sparse"),
        (compressed(config_groups={"a": {}, "b": {}}), "2 config_groups"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(said: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        read_scheme(said)
    assert (caught.value.code, caught.value.field) == ("unsupported_model", "quantization_config")


def test_listing_formats_and_reading_schemes_needs_no_torch() -> None:
    code = (
        "import sys; from tokenmill.quant.scheme import FORMATS, read_scheme; FORMATS.names(); "
        "from tokenmill.models.config import ModelConfig; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"int4", "int8"} <= set(FORMATS.names())


@pytest.mark.parametrize(
    ("quantize", "head", "chosen"),
    [
        ("none", "auto", ["none", "none", "none"]),
        ("int8", "auto", ["int8", "int8", "int8"]),
        ("int4", "auto", ["int8", "int8", "int4"]),
        ("int4", "int4", ["int4", "int4", "int4"]),
        ("int4", "none", ["none", "none", "int4"]),
        ("none", "int8", ["int8", "int8", "none"]),
    ],
)
def test_formats_of_a_models_matrices(quantize: str, head: str, chosen: list[str]) -> None:
    rounding = Rounding(quantize, head)
    assert [rounding.format_of(name) for name in ("embedding", "head", "layers.3.mlp.down")] == chosen
