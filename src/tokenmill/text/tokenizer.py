"""Text to token ids and back, from the files of a Hugging Face model folder.

Decoding goes through bytes: every token has its bytes (`Tokenizer.token_bytes`), and the text is those bytes read as
UTF-8. So a text can be decoded token by token with no window to decode twice (`tokenmill.text.stream`), and a grammar
can be matched against tokens that hold half a character.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tokenmill.errors import ModelError, RequestError

__all__ = ["Tokenizer"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer with its special tokens and chat template. Immutable, except for a cache; safe to use from threads.

    Args:
        backend: the tokenizer proper; its stored truncation and padding are switched off.
        special_tokens: texts of the special tokens by role (``bos_token``, ``eos_token``, ...), for chat templates.
        eos_token_ids: tokens that end a completion.
        chat_template: Jinja source, if the model has one.

    Raises:
        ModelError: ``unsupported_tokenizer`` when its decoder is neither byte-level nor of SentencePiece's kind.
    """

    def __init__(
        self,
        backend: Any,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._alphabet = _Alphabet(json.loads(backend.to_str())["decoder"])
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self.special_tokens: Mapping[str, str] = dict(special_tokens or {})
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_ids)
        self.chat_template = chat_template

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja`` and ``generation_config.json``.

        Only the first must exist. A chat template in its own file wins over one in the configuration.

        Raises:
            ModelError: ``tokenizer_not_found``, ``tokenizer_malformed``, ``unsupported_tokenizer``.
        """
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ModelError(
                "tokenizer_not_found",
                f"{path} holds no tokenizer.json. A tokenizer in another format must be converted first: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes it.",
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise ModelError("tokenizer_malformed", f"{file} cannot be read: {error}.") from error
        config = _read_json(path / "tokenizer_config.json")
        special = {name: text for name in _SPECIAL_NAMES if (text := _text_of(config.get(name)))}
        template_file = path / "chat_template.jinja"
        template = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")

        eos = [backend.token_to_id(special["eos_token"])] if "eos_token" in special else []
        more = _read_json(path / "generation_config.json").get("eos_token_id")
        eos += more if isinstance(more, list) else [more]
        return cls(backend, special, tuple(dict.fromkeys(i for i in eos if i is not None)), template)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's logits may be wider (padding)."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. The text of a special token inside `text` becomes that token, as in `transformers`.

        Raises:
            RequestError: ``invalid_text`` when `text` holds half of a surrogate pair, which is not a character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError("invalid_text", f"The text is not valid Unicode: {error.reason}.", "prompt") from None
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids that are no token are left out."""
        skip = self._special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(i) for i in ids if i not in skip)
        return self.strip_start(data).decode("utf-8", errors="replace")

    def strip_start(self, data: bytes) -> bytes:
        """`data`, the first bytes of a text, without the space that SentencePiece puts before the first word."""
        return data.removeprefix(self._alphabet.prefix) if self._alphabet.prefix else data

    def is_special(self, token_id: int) -> bool:
        """Whether the token controls the model and is no text."""
        return token_id in self._special_ids

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; None if there is none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def added_id(self, text: str) -> int | None:
        """The id of the token that was added with just this text, special or not, None when there is none."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id if token_id in self._added_ids else None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text; empty for an id that is no token."""
        data = self._bytes.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
            if token is None:
                return b""
            data = self._bytes[token_id] = self._alphabet.bytes_of(token)
        return data

    def token_text(self, token_id: int) -> str:
        """The token alone as text, for showing; half a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


class _Alphabet:
    """How the vocabulary writes bytes: the part of a ``decoder`` in tokenizer.json that concerns single tokens.

    Two kinds exist. Byte-level (GPT-2): each byte is written as one printable character. SentencePiece: text as it is,
    with U+2581 for the space and ``<0x0A>`` for a byte that has no token.
    """

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        steps = (decoder or {}).get("decoders") or ([decoder] if decoder else [])
        kinds = {step["type"] for step in steps}
        self.byte_level = "ByteLevel" in kinds
        self.byte_fallback = "ByteFallback" in kinds
        self.replacements: list[tuple[str, str]] = []
        self.prefix = b""
        for step in steps:
            if step["type"] == "Metaspace":
                self.replacements.append((step["replacement"], " "))
                self.prefix = b"" if step.get("prepend_scheme", "always") == "never" else b" "
            elif step["type"] == "Replace" and "String" in step["pattern"]:
                self.replacements.append((step["pattern"]["String"], step["content"]))
            elif step["type"] == "Strip" and step["stop"] == 0:
                self.prefix = (step["content"] * step["start"]).encode()
            elif step["type"] not in ("ByteLevel", "ByteFallback", "Fuse"):
                raise _unsupported(step["type"])
        if not steps:
            raise _unsupported("none")

    def bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            # A token with a character outside the alphabet was added by hand and stands for itself.
            known = all(char in _BYTE_OF for char in token)
            return bytes(_BYTE_OF[char] for char in token) if known else token.encode()
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def _unsupported(kind: str) -> ModelError:
    return ModelError(
        "unsupported_tokenizer",
        f"The tokenizer's decoder ({kind}) is not supported; byte-level BPE and SentencePiece tokenizers are.",
    )


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet (github.com/openai/gpt-2, encoder.py): printable bytes are themselves, others U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when the file does not exist."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError("tokenizer_malformed", f"{file} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ModelError("tokenizer_malformed", f"{file} holds no JSON object.")
    return content


def _text_of(token: Any) -> str | None:
    """A special token is written as its text or as an object with its text under ``content``."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
