"""Packed weights kept beside a model: used when they are right, made anew when anything is not."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenmill.kernels.cpu._native", reason="the native kernels are not built")

from tokenmill.models import loader
from tokenmill.models.decoder import Decoder
from tokenmill.quant.scheme import Rounding
from tokenmill.testing import random_model

quantized = pytest.mark.parametrize("quantize", ["none", "int8", "int4"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return random_model(tmp_path / "model")


def load(folder: Path, quantize: str = "none", cache: bool = True, **rounding: str) -> Decoder:
    chosen = Rounding(quantize, **rounding)
    decoder = loader.load(folder, "bfloat16", rounding=chosen, block_size=16, pack_cache=cache)
    assert decoder.native
    return decoder


def kept(folder: Path, name: str = "bf16") -> Path:
    return folder / ".tokenmill" / f"{name}.safetensors"


def outcome(decoder: Decoder) -> torch.Tensor:
    """What the embedding and the head compute."""
    hidden = decoder._embedding(torch.tensor([1, 5, 200, 5]))
    return decoder.logits(hidden)


def same(one: Decoder, other: Decoder) -> bool:
    """Whether every weight is equal to the bit."""
    return torch.equal(outcome(one), outcome(other)) and all(
        torch.equal(getattr(a, way).projection.dequantize(), getattr(b, way).projection.dequantize())
        for a, b in zip(one._layers.layers, other._layers.layers, strict=True)
        for way in ("from_attention", "from_mlp")
    )


@quantized
def test_a_start_from_the_cache_is_the_same_model(folder: Path, quantize: str) -> None:
    plain, first = load(folder, quantize, cache=False), load(folder, quantize)
    assert kept(folder, {"none": "bf16"}.get(quantize, quantize)).is_file()
    second = load(folder, quantize)
    assert same(plain, first)
    assert same(plain, second)
    assert plain.weight_bytes == second.weight_bytes


def test_each_format_of_the_head_has_its_file(folder: Path) -> None:
    """Formats that are the same by whatever option share it."""
    for head in ("auto", "int8", "int4", "none"):
        first = load(folder, "int4", quantize_head=head)
        assert same(first, load(folder, "int4", cache=False, quantize_head=head))
        assert same(first, load(folder, "int4", quantize_head=head))
    names = {file.name for file in kept(folder).parent.iterdir()}
    assert names == {f"int4{head}.safetensors" for head in ("", "-head-int4", "-head-bf16")}


def test_a_file_of_another_rounding_is_not_taken(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(folder, "int4", quantize_head="int4")
    kept(folder, "int4-head-int4").rename(kept(folder, "int4"))
    with caplog.at_level(logging.WARNING):
        again = load(folder, "int4")
    assert "made anew" in caplog.text
    assert same(again, load(folder, "int4", cache=False))


def test_activations_leave_the_packed_weights_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder, "int4")
    plain = load(folder, "int4", cache=False, activations="bf16")
    monkeypatch.setattr(loader.Checkpoint, "read", None)
    again = load(folder, "int4", activations="bf16")
    assert same(again, plain)
    assert not torch.equal(outcome(again), outcome(load(folder, "int4")))


def test_nothing_is_written_unless_asked_for(folder: Path) -> None:
    load(folder, cache=False)
    assert not kept(folder).parent.exists()


def test_the_second_start_reads_no_weight_of_the_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    monkeypatch.setattr(loader.Checkpoint, "read", None)
    seen: list[tuple[int, int]] = []
    loader.load(folder, "bfloat16", block_size=16, pack_cache=True, progress=lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("change", ["touched", "other weights", "truncated", "not a file of tensors", "other shapes"])
def test_what_does_not_fit_is_made_anew(folder: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    load(folder)
    file, weights = kept(folder), folder / "model.safetensors"
    if change == "touched":
        os.utime(weights, ns=(1, 1))
    elif change == "other weights":
        random_model(folder, seed=7)
        os.utime(weights, ns=(2, 2))
    elif change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif change == "not a file of tensors":
        file.write_bytes(b"no")
    else:
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        described = json.loads(header["__metadata__"]["weights"])
        described["embedding"]["outputs"] += 64
        header["__metadata__"]["weights"] = json.dumps(described)
        said = json.dumps(header).encode()
        file.write_bytes(len(said).to_bytes(8, "little") + said + data[8 + size :])
    before = file.stat().st_ino
    with caplog.at_level(logging.WARNING):
        again = load(folder)
    assert "made anew" in caplog.text
    assert same(again, load(folder, cache=False))
    assert file.stat().st_ino != before
    caplog.clear()
    assert same(load(folder), again)
    assert not caplog.text


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (folder / ".tokenmill").write_text("a file where the folder would be")
    first = load(folder)
    files = list((tmp_path / "cache").rglob("bf16.safetensors"))
    assert len(files) == 1
    assert same(first, load(folder))


def test_a_failed_write_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert same(load(folder), load(folder, cache=False))
    assert not list(folder.rglob("*.partial"))
    assert not kept(folder).exists()


def test_writers_at_the_same_time(folder: Path) -> None:
    """Each writes a file of its own; whoever is last stays, and all models are whole."""
    models: list[Decoder] = []
    threads = [threading.Thread(target=lambda: models.append(load(folder))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain = load(folder, cache=False)
    assert len(models) == 6
    assert all(same(each, plain) for each in [*models, load(folder)])
    assert [file.name for file in kept(folder).parent.iterdir()] == ["bf16.safetensors"]
