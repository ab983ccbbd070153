import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import pytest

from tokenmill.types import CompletionOutput, FinishReason, RequestOutput, SamplingParams, TokenLogprobs


class FakeTokenizer:
    """One token per character; a template that writes each message as ``role:content;``."""

    eos_token_ids = (1, 2)
    special_tokens: ClassVar[dict[str, str]] = {}
    chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ tools or '' }}"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [ord(letter) for letter in text]

    def text(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def _piece(text, reason):
    return CompletionOutput(index=0, text=text, token_ids=[ord(letter) for letter in text], finish_reason=reason)


@dataclasses.dataclass
class FakeLLM:
    """Answers every prompt with the same pieces, one token per letter, and remembers what it was asked."""

    pieces: tuple[str, ...] = ("Hel", "lo.")
    error: Exception | None = None
    """Raised after the first piece."""
    reason: FinishReason = FinishReason.STOP

    def __post_init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.asked: list[tuple[str, SamplingParams]] = []
        self.closed = 0

    def stream(self, prompt, params):
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.asked.append((self.tokenizer.text(ids), params))
        try:
            for number, piece in enumerate(self.pieces):
                last = number == len(self.pieces) - 1
                made = _piece(piece, self.reason if last else None)
                yield RequestOutput(
                    request_id="0", prompt=None, prompt_token_ids=ids, outputs=[made], finished=last, cached_tokens=3
                )
                if self.error is not None:
                    raise self.error
        finally:
            self.closed += 1

    def generate(self, prompts, params):
        """Whole answers. Of a token with id i the log probability is -i."""
        outputs = []
        for ids in prompts:
            self.asked.append((self.tokenizer.text(ids), params))
            text = "".join(self.pieces)
            logprobs = None
            if params.prompt_logprobs is not None:
                logprobs = [None, *(TokenLogprobs([i], [-float(i)], 1) for i in ids[1:])]
            outputs.append(
                RequestOutput(
                    request_id="0",
                    prompt=None,
                    prompt_token_ids=list(ids),
                    finished=True,
                    prompt_logprobs=logprobs,
                    outputs=[_piece(text, FinishReason.STOP)],
                )
            )
        return outputs


@pytest.fixture
def llm():
    return FakeLLM()
