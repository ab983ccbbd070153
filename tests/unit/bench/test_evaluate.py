import math
from collections.abc import Callable, Sequence

import pytest

from tokenmill.bench import evaluate as bench
from tokenmill.models.demo import corpus, tasks

FILES = (
    corpus.SourceFile("a.py", "import os\n\nname = os.name\nprint(name)\nprint(os.sep)\n" * 3),
    corpus.SourceFile("b.py", "def é():\n    return 1\n\n\ndef g():\n    return é()\n"),
)


class OneBytePerToken:
    """A model with a fixed probability per token that answers every conversation with what `answer` says."""

    start_token = 256
    context = 16

    def __init__(self, answer: Callable[[str], str], probability: float = 0.5) -> None:
        self.answer, self.probability = answer, probability
        self.windows: list[list[int]] = []

    def chat(
        self,
        conversations: Sequence[Sequence[tasks.Message]],
        tools: Sequence[Sequence[tasks.Message]],
        max_tokens: int,
    ) -> list[str]:
        assert len(tools) == len(conversations)
        assert max_tokens > 0
        return [self.answer(conversation[-1]["content"]) for conversation in conversations]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def logprobs(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        self.windows = [list(ids) for ids in token_ids]
        return [[math.log(self.probability)] * (len(ids) - 1) for ids in token_ids]


def know_everything(seed: int, n: int) -> Callable[[str], str]:
    asked = [task for kind in tasks.TASKS for task in tasks.generate(kind, seed, n)]
    asked += tasks.generate_code([file.text for file in FILES], seed, n)
    answers = {task.messages[-1]["content"]: task.answer for task in asked}
    return answers.__getitem__


def test_a_model_that_knows_every_answer_scores_one_everywhere() -> None:
    result = bench.evaluate(OneBytePerToken(know_everything(3, 12)), n=12, seed=3, files=FILES)
    assert list(result.tasks) == list(bench.KINDS)
    scores = [score for kind, score in result.tasks.items() if kind != "continue_code"]
    assert result.valid_json is not None
    for score in [*scores, result.valid_json]:
        assert (score.n, score.correct, score.accuracy, score.high) == (12, 12, 1.0, 1.0)
        assert 0.7 < score.low < 0.8


def test_a_silent_model_scores_zero() -> None:
    result = bench.evaluate(OneBytePerToken(lambda _question: ""), n=5, files=FILES)
    assert all(score.correct == 0 and score.low == 0.0 for score in result.tasks.values())
    assert result.valid_json == bench.Score.of(0, 5)


def test_only_the_asked_kinds_are_run_and_unknown_ones_refused() -> None:
    model = OneBytePerToken(lambda _question: "1")
    result = bench.evaluate(model, n=4, kinds=("copy",), files=())
    assert list(result.tasks) == ["copy"]
    assert result.valid_json is None
    assert result.compression is None
    with pytest.raises(ValueError, match="juggle"):
        bench.evaluate(model, kinds=("copy", "juggle"))


def test_the_seed_alone_decides_the_result() -> None:
    first, second = (bench.evaluate(OneBytePerToken(str.upper), n=6, seed=5, files=FILES) for _ in range(2))
    assert first == second


def test_bits_per_byte_counts_every_byte_of_every_file_once() -> None:
    model = OneBytePerToken(str, probability=0.25)
    found = bench.measure_compression(model, FILES)
    assert found.files == 2
    assert found.bytes == sum(len(file.text.encode()) for file in FILES)
    assert found.bits_per_byte == pytest.approx(2.0)
    assert found.low == pytest.approx(2.0)
    assert found.high == pytest.approx(2.0)
    assert all(window[0] == model.start_token and len(window) <= model.context for window in model.windows)
    assert bytes(byte for window in model.windows for byte in window[1:]) == b"".join(f.text.encode() for f in FILES)


def test_bits_per_byte_of_unequal_files_has_an_interval_around_it() -> None:
    class Uneven(OneBytePerToken):
        def logprobs(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
            return [[-1.0 if i % 2 else -3.0] * (len(ids) - 1) for i, ids in enumerate(token_ids)]

    files = [corpus.SourceFile(f"{i}.py", "x = 1\n" * (i + 1)) for i in range(10)]
    found = bench.measure_compression(Uneven(str), files)
    assert found.low < found.bits_per_byte < found.high


def test_compression_needs_a_file() -> None:
    with pytest.raises(ValueError, match="no files"):
        bench.measure_compression(OneBytePerToken(str), [])


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(95, 100, 0.8882, 0.9785), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(correct: int, n: int, low: float, high: float) -> None:
    score = bench.Score.of(correct, n)
    assert score.low == pytest.approx(low, abs=1e-4)
    assert score.high == pytest.approx(high, abs=1e-4)


def test_table_has_a_line_for_every_measure() -> None:
    table = bench.format_table(bench.evaluate(OneBytePerToken(str), n=2, files=FILES))
    for name in (*bench.KINDS, "valid JSON", "bits per byte 1.000"):
        assert name in table
