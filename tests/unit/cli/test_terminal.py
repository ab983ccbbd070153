import pytest

from tokenmill.cli.terminal import stream
from tokenmill.errors import EngineError
from tokenmill.testing import FakeClock
from tokenmill.types import FinishReason, SamplingParams


def _watched(outputs, clock, seconds):
    """`outputs`, each after the next of `seconds`."""
    for output, wait in zip(outputs, seconds, strict=True):
        clock.advance(wait)
        yield output


def test_an_answer_is_written_piece_by_piece_and_measured(llm):
    clock, written = FakeClock(), []
    outputs = llm.stream("question", SamplingParams())
    answer = stream(_watched(outputs, clock, [0.5, 1.0]), written.append, clock)
    assert written == ["Hel", "lo."]
    assert (answer.text, answer.finish_reason) == ("Hello.", FinishReason.STOP)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (8, 3, 6)
    assert (answer.ttft_s, answer.total_s, answer.tokens_per_s) == (0.5, 1.5, 5.0)
    assert answer.summary() == "6 tokens, 5.0 tokens/s, first after 500 ms, prompt 8 tokens (3 cached)"


def test_an_interrupted_answer_keeps_what_was_written_and_closes_the_request(llm):
    llm.error = KeyboardInterrupt()
    answer = stream(llm.stream("question", SamplingParams()), lambda _: None)
    assert (answer.text, answer.finish_reason) == ("Hel", None)
    assert llm.closed == 1


def test_a_reader_who_fails_closes_the_request(llm):
    def write(_):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        stream(llm.stream("question", SamplingParams()), write)
    assert llm.closed == 1


def test_the_engine_s_error_reaches_the_caller(llm):
    llm.error = EngineError("engine_failed", "Gone.")
    with pytest.raises(EngineError, match="Gone"):
        stream(llm.stream("question", SamplingParams()), lambda _: None)


def test_an_answer_of_one_token_has_no_speed(llm):
    llm.pieces = ("x",)
    assert stream(llm.stream("question", SamplingParams()), lambda _: None).tokens_per_s == 0.0
