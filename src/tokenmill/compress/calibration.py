"""The text that a model is calibrated with, and what its layers see of it."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmill.errors import ConfigError
from tokenmill.layers.attention import KVView
from tokenmill.layers.linear import Linear
from tokenmill.layers.rotary import Rotary
from tokenmill.models.decoder import Block
from tokenmill.models.demo import corpus
from tokenmill.models.spec import LayerSpec, ModelSpec
from tokenmill.quant.method import Statistics
from tokenmill.text.chat import render
from tokenmill.text.tokenizer import Tokenizer

__all__ = ["Calibration", "documents", "windows"]

_LETTERS_PER_TOKEN = 6
"""More than tokens have on average, so that pieces of text fill their windows."""

_TOKENS_AT_ONCE = 4096
_BLOCK_SIZE = 16


def documents(file: Path | None, tokenizer: Tokenizer) -> Iterator[str]:
    """Texts to calibrate with.

    Args:
        file: ``.txt``, one text; ``.jsonl``, one text per line as ``{"text": ...}`` or ``{"messages": [...]}``, which
            the model's chat template renders. None is the standard library of Python, less what evaluations use.

    Raises:
        ConfigError: ``calibration_malformed``, ``calibration_not_found``.
        RequestError: as `text.chat.render`.
    """
    if file is None:
        yield from (source.text for source in corpus.training_files())
        return
    try:
        content = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("calibration_not_found", f"{file} cannot be read: {error.strerror}.", "calibration") from None
    except UnicodeDecodeError as error:
        raise ConfigError("calibration_malformed", f"{file} is not UTF-8: {error.reason}.", "calibration") from None
    if file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield _document(line, f"{file}, line {number}", tokenizer)


def _document(line: str, where: str, tokenizer: Tokenizer) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError("calibration_malformed", f"{where} is not JSON: {error}.", "calibration") from None
    match record:
        case {"messages": list(messages)}:
            return render(tokenizer, messages, record.get("tools"), add_generation_prompt=False)
        case {"text": str(text)}:
            return text
    raise ConfigError("calibration_malformed", f'{where} has neither "text" nor "messages".', "calibration")


def windows(texts: Iterable[str], tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Token ids of `count` pieces, of at most `length` tokens each, drawn from all over the texts; the same each time.

    Raises:
        ConfigError: ``calibration_malformed`` when the texts are empty.
    """
    size = _LETTERS_PER_TOKEN * length
    pieces = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
    drawn = random.Random(0).sample(pieces, min(count, len(pieces)))
    begin = tokenizer.special_tokens.get("bos_token")
    first = tokenizer.encode(begin, add_special_tokens=False) if begin else []
    encoded = [tokenizer.encode(piece, add_special_tokens=False) for piece in drawn]
    found = [(ids if ids[: len(first)] == first else first + ids)[:length] for ids in encoded if ids]
    if not found:
        raise ConfigError("calibration_malformed", "There is no text to calibrate with.", "calibration")
    return found


@dataclass(frozen=True)
class _Batch:
    """Whole sequences, one after another, each with blocks of its own."""

    positions: Tensor
    slots: Tensor
    table: Tensor
    query_start: Tensor
    lengths: Tensor

    @staticmethod
    def of(lengths: Sequence[int]) -> _Batch:
        blocks = -(-max(lengths) // _BLOCK_SIZE)
        spans = [torch.arange(length) for length in lengths]
        return _Batch(
            torch.cat(spans),
            torch.cat([span + row * blocks * _BLOCK_SIZE for row, span in enumerate(spans)]),
            torch.arange(len(lengths) * blocks, dtype=torch.int32).view(len(lengths), blocks),
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
        )

    def view(self, heads: int, head_dim: int, dtype: torch.dtype) -> KVView:
        """A cache for the keys and values of one layer."""
        keys, values = (torch.zeros(self.table.numel(), heads, _BLOCK_SIZE, head_dim, dtype=dtype) for _ in range(2))
        return KVView(keys, values, self.slots, self.table, self.query_start, self.lengths)


@dataclass(frozen=True)
class _Observed(Linear):
    """A dense layer that notes what goes in."""

    seen: Statistics = field(kw_only=True)

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.add(x)
        return super().__call__(x)


class Calibration:
    """Hidden states of the calibration text on their way through the layers. Of no text, all statistics stay empty.

    Args:
        embedded: the first hidden states of each window, [length, H], in the model's type. Used, and changed.
        step: called after each batch that has gone through a layer.
    """

    def __init__(self, spec: ModelSpec, embedded: Sequence[Tensor], step: Callable[[], None]) -> None:
        self._spec, self._step = spec, step
        self.hidden: list[Tensor] = []
        """[tokens, H] of each batch of windows."""
        self._batches: list[_Batch] = []
        per_batch = max(1, _TOKENS_AT_ONCE // max((len(each) for each in embedded), default=1))
        for start in range(0, len(embedded), per_batch):
            group = embedded[start : start + per_batch]
            self.hidden.append(torch.cat(list(group)))
            self._batches.append(_Batch.of([len(each) for each in group]))

    @property
    def batches(self) -> int:
        return len(self._batches)

    @property
    def tokens(self) -> int:
        return sum(len(hidden) for hidden in self.hidden)

    def observe(self, layer: LayerSpec, block: Block) -> dict[str, Statistics]:
        """What the linear layers of a block are given, by our names; the hidden states stay before it."""
        attention, mlp = block.attention, block.mlp
        linears = {
            "attention.qkv": attention.qkv,
            "attention.out": attention.out,
            "mlp.gate_up": mlp.gate_up,
            "mlp.down": mlp.down,
        }
        seen = {name: Statistics(linear.weight.shape[1]) for name, linear in linears.items()}
        qkv, out, gate_up, down = (_Observed(each.weight, each.bias, seen=seen[name]) for name, each in linears.items())
        watched = replace(
            block, attention=replace(attention, qkv=qkv, out=out), mlp=replace(mlp, gate_up=gate_up, down=down)
        )
        for _ in self._passed(layer, watched):
            self._step()
        return seen

    def advance(self, layer: LayerSpec, block: Block) -> None:
        """Moves the hidden states through a block."""
        for index, hidden in enumerate(self._passed(layer, block)):
            self.hidden[index] = hidden
            self._step()

    @torch.inference_mode()
    def _passed(self, layer: LayerSpec, block: Block) -> Iterator[Tensor]:
        spec = layer.attention
        rotary = Rotary(spec.rope.frequencies(self._spec.max_position), spec.rope.attention_factor, torch.device("cpu"))
        for hidden, batch in zip(self.hidden, self._batches, strict=True):
            kv = batch.view(spec.kv_heads, spec.head_dim, hidden.dtype)
            yield block(hidden.clone(), rotary(batch.positions), kv)
