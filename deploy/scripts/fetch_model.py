"""Brings a model from the Hugging Face hub into a folder, once: ``fetch_model.py REPO REVISION FOLDER``.

``FOLDER/.complete`` appears when everything is there, and servers wait for it. A run that was cut off goes on where it
stopped. HF_TOKEN is used where it is set.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["fetch"]

FILES = ["*.json", "*.safetensors", "*.jinja"]
"""What tokenmill reads of a checkpoint."""


def fetch(repo: str, revision: str, folder: Path) -> bool:
    """Fetches what is missing. Returns whether anything was."""
    complete = folder / ".complete"
    if complete.exists():
        return False
    import huggingface_hub

    huggingface_hub.snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=FILES)
    complete.touch()
    return True


if __name__ == "__main__":
    repo, revision, folder = sys.argv[1:]
    print(f"{repo} at {revision}: {'fetched' if fetch(repo, revision, Path(folder)) else 'already there'}", flush=True)
