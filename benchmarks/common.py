"""What the benchmarks share: the model, the workloads, the manifest."""

from __future__ import annotations

import json
import platform
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenmill import __version__
from tokenmill.device import machine
from tokenmill.testing import random_model

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"

QWEN3_0_6B = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}  # fmt: skip
"""The shape of Qwen3-0.6B (its config.json): 596 M parameters with a tied head."""


def model_folder(name: str = "qwen3-0.6b-random") -> Path:
    """A model of Qwen3-0.6B's shape with random bf16 weights; made once under benchmarks/models."""
    folder = ROOT / "models" / name
    if not (folder / "tokenizer_config.json").exists():
        print(f"making random weights in {folder} ...", file=sys.stderr)
        random_model(folder, dtype="bfloat16", **QWEN3_0_6B)
    return folder


def token_ids(seed: int, count: int) -> list[int]:
    """Random token ids, the same for every engine."""
    rng = random.Random(seed)
    return [rng.randrange(300, 4000) for _ in range(count)]


def ragged_requests(seed: int, count: int = 32) -> list[tuple[list[int], int]]:
    """(prompt, tokens to generate) with 32-256 tokens in and 32-128 out."""
    rng = random.Random(seed)
    lengths = [(rng.randint(32, 256), rng.randint(32, 128)) for _ in range(count)]
    return [(token_ids(seed * 1000 + index, prompt), output) for index, (prompt, output) in enumerate(lengths)]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def manifest() -> dict[str, Any]:
    """What a result was measured on and with."""
    facts = machine()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    packages = ("torch", "transformers", "numpy")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "versions": {"tokenmill": __version__} | {name: version(name) for name in packages},
        "processor": facts.processor,
        "cores": facts.cores,
        "memory_gib": round(facts.memory_bytes / 2**30, 1),
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Writes a result with its manifest to benchmarks/results/NAME.json and prints it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"manifest": manifest(), **result}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
