"""Tokenizer: what it reads from a model folder, and that decoding by bytes is the decoding of `tokenizers`."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.errors import ModelError, RequestError
from tokenmill.text.tokenizer import Tokenizer

WHOLE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


class TestLoad:
    def test_only_tokenizer_json_is_needed(self, folder: Path, byte_level_backend: Any) -> None:
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.vocab_size == byte_level_backend.get_vocab_size()
        assert (tokenizer.eos_token_ids, tokenizer.chat_template, tokenizer.special_tokens) == ((), None, {})

    def test_end_tokens_come_from_both_files_without_repetition(self, folder: Path) -> None:
        write(folder, "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}, "bos_token": None})
        write(folder, "generation_config.json", {"eos_token_id": [2, 0]})
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.eos_token_ids == (2, 0)
        assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}

    def test_single_end_token_in_generation_config(self, folder: Path) -> None:
        write(folder, "generation_config.json", {"eos_token_id": 1})
        assert Tokenizer.load(folder).eos_token_ids == (1,)

    def test_template_file_wins_over_the_configuration(self, folder: Path) -> None:
        write(folder, "tokenizer_config.json", {"chat_template": "from config"})
        assert Tokenizer.load(folder).chat_template == "from config"
        write(folder, "chat_template.jinja", "from file")
        assert Tokenizer.load(folder).chat_template == "from file"

    def test_of_several_templates_the_default_is_taken(self, folder: Path) -> None:
        templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
        write(folder, "tokenizer_config.json", {"chat_template": templates})
        assert Tokenizer.load(folder).chat_template == "plain"

    def test_stored_truncation_and_padding_are_off(self, folder: Path) -> None:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.enable_truncation(2)
        backend.enable_padding(length=50)
        backend.save(str(folder / "tokenizer.json"))
        tokenizer = Tokenizer.load(folder)
        text = "The end of a longer text"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode("a")) == 1

    @pytest.mark.parametrize(
        ("name", "content", "code"),
        [
            ("tokenizer.json", "{", "tokenizer_malformed"),
            ("tokenizer_config.json", "{", "tokenizer_malformed"),
            ("tokenizer_config.json", "[]", "tokenizer_malformed"),
        ],
    )
    def test_broken_files_are_named(self, folder: Path, name: str, content: str, code: str) -> None:
        write(folder, name, content)
        with pytest.raises(ModelError, match=name) as caught:
            Tokenizer.load(folder)
        assert caught.value.code == code

    def test_missing_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"tokenizer\.json") as caught:
            Tokenizer.load(tmp_path)
        assert caught.value.code == "tokenizer_not_found"

    @pytest.mark.parametrize("decoder", [None, tokenizers.decoders.WordPiece()])
    def test_other_kinds_are_refused(self, decoder: Any) -> None:
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        if decoder:
            backend.decoder = decoder
        with pytest.raises(ModelError) as caught:
            Tokenizer(backend)
        assert caught.value.code == "unsupported_tokenizer"


class TestBytes:
    @given(data=st.data(), skip=st.booleans())
    def test_byte_level_decode_is_that_of_the_library_for_any_ids(
        self, byte_level: Tokenizer, byte_level_backend: Any, data: st.DataObject, skip: bool
    ) -> None:
        ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 5)))
        assert byte_level.decode(ids, skip) == byte_level_backend.decode(ids, skip_special_tokens=skip)

    @given(text=WHOLE)
    def test_byte_level_round_trip(self, byte_level: Tokenizer, text: str) -> None:
        assert byte_level.decode(byte_level.encode(text), skip_special_tokens=False) == text

    @given(text=WHOLE)
    def test_sentencepiece_decode_is_that_of_the_library_for_any_text(
        self, sentencepiece: Tokenizer, sentencepiece_backend: Any, text: str
    ) -> None:
        ids = sentencepiece.encode(text)
        assert sentencepiece.decode(ids) == sentencepiece_backend.decode(ids)

    def test_first_space_of_sentencepiece_is_no_text(self, sentencepiece: Tokenizer) -> None:
        ids = sentencepiece.encode("hello you")
        assert sentencepiece.token_bytes(ids[0]) == b" "
        assert sentencepiece.decode(ids) == "hello you"

    def test_metaspace_decoder(self) -> None:
        vocab = [("<unk>", 0.0), ("▁hi", -1.0), ("▁you", -1.0)]
        backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, 0, byte_fallback=False))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        backend.decoder = tokenizers.decoders.Metaspace()
        tokenizer = Tokenizer(backend)
        assert tokenizer.decode([1, 2]) == backend.decode([1, 2]) == "hi you"

    def test_half_a_character_has_bytes_and_shows_as_replacement(self, byte_level: Tokenizer) -> None:
        ids = byte_level.encode("🎊")
        assert b"".join(byte_level.token_bytes(i) for i in ids) == "🎊".encode()
        assert byte_level.token_text(ids[0]) == "\ufffd"

    @pytest.mark.parametrize("token_id", [-1, 320, 2**32, 2**62])
    def test_ids_that_are_no_token_have_no_text(self, byte_level: Tokenizer, token_id: int) -> None:
        assert byte_level.token_bytes(token_id) == b""
        assert byte_level.decode([token_id, *byte_level.encode("a"), token_id]) == "a"

    def test_hand_added_token_stands_for_itself(self, byte_level_backend: Any) -> None:
        backend = tokenizers.Tokenizer.from_str(byte_level_backend.to_str())
        backend.add_tokens(["two words"])
        tokenizer = Tokenizer(backend)
        assert tokenizer.token_text(tokenizer.encode("two words")[0]) == "two words"

    def test_special_tokens_are_skipped_or_shown(self, byte_level: Tokenizer) -> None:
        ids = byte_level.encode("end<|im_end|>")
        assert byte_level.decode(ids) == "end"
        assert byte_level.decode(ids, skip_special_tokens=False) == "end<|im_end|>"

    def test_half_a_surrogate_pair_is_refused(self, byte_level: Tokenizer) -> None:
        with pytest.raises(RequestError) as caught:
            byte_level.encode("a\ud800")
        assert caught.value.code == "invalid_text"
