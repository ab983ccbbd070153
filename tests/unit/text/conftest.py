"""Small tokenizers of the two kinds that models use, trained or assembled on the spot."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenmill.text.tokenizer import Tokenizer

CORPUS = ["Hello world, hello there.", "The café in Köln – 你好世界 😀🎉", "stop STOP END the end"] * 4


@pytest.fixture(scope="session")
def byte_level_backend() -> Any:
    """Byte-level BPE, 320 tokens: few merges, so characters outside ASCII are split over tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def sentencepiece_backend() -> Any:
    """Llama 2's kind: U+2581 for the space, one token per byte as fallback, a space before the first word."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for char in "▁abcdefghijklmnopqrstuvwxyz.,é":
        vocab[char] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.fixture(scope="session")
def byte_level(byte_level_backend: Any) -> Tokenizer:
    return Tokenizer(byte_level_backend)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_backend: Any) -> Tokenizer:
    return Tokenizer(sentencepiece_backend)


@pytest.fixture
def folder(tmp_path: Path, byte_level_backend: Any) -> Path:
    """A model folder that holds only tokenizer.json."""
    byte_level_backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path
