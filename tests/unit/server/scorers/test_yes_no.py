"""Scores by "yes" against "no" are those of the model's raw logits."""

import asyncio
import math

import pytest

from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.errors import RequestError
from tokenmill.llm import LLM
from tokenmill.server.scorers import yes_no
from tokenmill.server.scoring import Question
from tokenmill.types import RequestOutput, SamplingParams

PAIRS = [("what is red", "roses"), ("what is blue", "the sky"), ("q", "d" * 40)]


@pytest.fixture(scope="module")
def llm(tiny_model_path):
    return LLM(config=build(EngineConfig, {"model": {"model": str(tiny_model_path), "max_model_len": 512}}))


class Ask:
    """Asks the engine of this process, and remembers how often."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.counts: list[int] = []

    async def __call__(self, questions: list[Question]) -> list[RequestOutput]:
        self.counts.append(len(questions))
        return [self.llm.generate([each.prompt], each.params)[0] for each in questions]


def expected(llm: LLM, pair: tuple[str, str]) -> float:
    """By scoring the prompt with each word put behind it."""
    prompt = yes_no._prompt(llm.tokenizer, pair)
    logprobs = []
    for word in ("yes", "no"):
        token = llm.tokenizer.encode(word)[0]
        (output,) = llm.generate([[*prompt, token]], SamplingParams(max_tokens=1, prompt_logprobs=0))
        logprobs.append(output.prompt_logprobs[-1].logprobs[0])
    yes, no = map(math.exp, logprobs)
    return yes / (yes + no)


def test_a_score_is_the_probability_of_yes_against_no(llm):
    ask = Ask(llm)
    scores = asyncio.run(yes_no.SCORER.score(llm, PAIRS, ask))
    assert scores == pytest.approx([expected(llm, pair) for pair in PAIRS], rel=1e-5)
    assert len(set(scores)) == len(PAIRS)
    assert ask.counts[0] == len(PAIRS)


def test_a_word_that_is_not_among_the_most_likely_is_asked_for(llm, monkeypatch):
    monkeypatch.setattr(yes_no, "_TOP", 0)
    ask = Ask(llm)
    scores = asyncio.run(yes_no.SCORER.score(llm, PAIRS, ask))
    assert scores == pytest.approx([expected(llm, pair) for pair in PAIRS], rel=1e-5)
    assert ask.counts == [3, 3]


def test_the_question_is_the_one_the_model_family_is_trained_on(llm):
    text = llm.tokenizer.decode(yes_no._prompt(llm.tokenizer, ("what is red", "roses")), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nJudge whether the Document meets the requirements")
    assert "<Query>: what is red\n<Document>: roses<|im_end|>\n<|im_start|>assistant\n" in text


def test_a_tokenizer_that_does_not_tell_the_words_apart_is_refused(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, add_special_tokens=True: [7])
    with pytest.raises(RequestError) as refused:
        asyncio.run(yes_no.SCORER.score(llm, PAIRS, Ask(llm)))
    assert refused.value.code == "unsupported_model"
