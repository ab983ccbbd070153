"""Where each peer's environment and its form of the models lie under the root folder."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE / ".work"

PEERS = ("tokenmill", "llamacpp", "openvino", "vllm", "transformers")
PRECISIONS = ("bf16", "int8", "int4")
MODELS = ("qwen3-0.6b", "demo")

_GGUF = {"bf16": "bf16", "int8": "Q8_0", "int4": "Q4_0"}


def python(root: Path, peer: str) -> Path:
    """The interpreter that has the peer; tokenmill and the ceilings run in this one."""
    if peer in ("openvino", "vllm", "transformers"):
        return root / peer / "env" / "bin" / "python"
    return Path(sys.executable)


def tools(root: Path) -> Path:
    """Programs of llama.cpp."""
    return root / "llamacpp" / "build" / "bin"


def hugging_face(root: Path, model: str) -> Path:
    """The model as everyone starts from it: a folder in Hugging Face layout, weights in bf16."""
    return root / "models" / model / "hf"


def model(root: Path, name: str, peer: str, precision: str) -> Path | None:
    """The model in the peer's own form, None if the peer has no such precision."""
    folder = root / "models" / name
    if peer == "tokenmill" or (precision == "bf16" and peer in ("transformers", "vllm")):
        return hugging_face(root, name)
    if peer == "llamacpp":
        return folder / f"{_GGUF[precision]}.gguf"
    if peer in ("vllm", "openvino"):
        return folder / f"{peer}-{precision}"
    return None
