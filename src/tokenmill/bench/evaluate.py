"""Accuracy of a model on the demo tasks, and its bits per byte on held-out files of the standard library.

Everything measured comes with a 95 % interval. The tasks, the files and the resampling depend on the seed alone, so
two evaluations of the same model with the same seed differ only where the model's answers do.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenmill.models.demo import corpus, tasks

SEED = 20_000
"""The default seed of an evaluation. Training never draws from `tasks.generate`, whatever its seed."""

KINDS = (*tasks.TASKS, "continue_code")
MAX_TOKENS = 160
_Z = 1.959964
_RESAMPLES = 2000


class Model(Protocol):
    """What an evaluation asks of a model."""

    @property
    def start_token(self) -> int:
        """The token put before a text so that its first token has something to follow."""

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that `logprobs` takes."""

    def chat(
        self,
        conversations: Sequence[Sequence[tasks.Message]],
        tools: Sequence[Sequence[tasks.Message]],
        max_tokens: int,
    ) -> list[str]:
        """Answer each conversation greedily with at most `max_tokens` tokens.

        `tools[i]` are the definitions offered to `conversations[i]`. An answer is the raw text of the turn, tool
        calls as the model writes them, without the token that ends it.
        """

    def encode(self, text: str) -> list[int]:
        """Encode plain text, adding nothing."""

    def logprobs(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Give, for each sequence, the natural-log probability of every token after the first."""


@dataclass(frozen=True)
class Score:
    """How many of `n` answers were right, with the 95 % Wilson interval `low` to `high` of the accuracy."""

    n: int
    correct: int
    accuracy: float
    low: float
    high: float

    @staticmethod
    def of(correct: int, n: int) -> "Score":
        """Score `correct` of `n` answers; of none, the accuracy is 0 and the interval all of 0 to 1."""
        if n == 0:
            return Score(0, 0, 0.0, 0.0, 1.0)
        share, scale = correct / n, 1 + _Z**2 / n
        centre = (share + _Z**2 / (2 * n)) / scale
        half = _Z / scale * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
        # At the ends the interval is closed by definition; rounding would leave a speck.
        low = 0.0 if correct == 0 else centre - half
        high = 1.0 if correct == n else centre + half
        return Score(n, correct, share, low, high)


@dataclass(frozen=True)
class Compression:
    """Bits per byte over `files` files of `bytes` bytes together, with a 95 % bootstrap interval over files."""

    files: int
    bytes: int
    bits_per_byte: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """The result: a score per kind of task, the share of extract_json answers that are valid, and compression.

    `compression` is None where no file was given to measure it on.
    """

    seed: int
    tasks: Mapping[str, Score]
    valid_json: Score | None
    compression: Compression | None


def evaluate(
    model: Model,
    *,
    n: int = 200,
    seed: int = SEED,
    kinds: Sequence[str] = KINDS,
    files: Sequence[corpus.SourceFile] | None = None,
) -> Evaluation:
    """Evaluate `model` on `n` tasks of each kind and on `files`, the held-out library files unless told.

    Raises `ValueError` for an unknown kind, and for continue_code when no file is long enough to make tasks from.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"unknown kinds of tasks: {', '.join(sorted(unknown))}")
    files = list(corpus.held_out_files()) if files is None else files
    scores: dict[str, Score] = {}
    valid_json = None
    for kind in kinds:
        if kind == "continue_code":
            asked = tasks.generate_code([file.text for file in files], seed, n)
        else:
            asked = tasks.generate(kind, seed, n)
        answers = model.chat([task.messages for task in asked], [task.tools for task in asked], MAX_TOKENS)
        scores[kind] = _score(tasks.is_correct, asked, answers)
        if kind == "extract_json":
            valid_json = _score(tasks.is_valid_json, asked, answers)
    return Evaluation(seed, scores, valid_json, measure_compression(model, files, seed) if files else None)


def measure_compression(model: Model, files: Sequence[corpus.SourceFile], seed: int = SEED) -> Compression:
    """Measure bits per byte of UTF-8 on files, each read in windows of the model's context that start afresh.

    Raises `ValueError` when there is no file.
    """
    if not files:
        raise ValueError("no files to measure bits per byte on")
    step = model.context - 1
    windows: list[list[int]] = []
    owners: list[int] = []
    for number, file in enumerate(files):
        ids = model.encode(file.text)
        for start in range(0, len(ids), step):
            windows.append([model.start_token, *ids[start : start + step]])
            owners.append(number)
    bits = [0.0] * len(files)
    for owner, logprobs in zip(owners, model.logprobs(windows), strict=True):
        bits[owner] -= math.fsum(logprobs) / math.log(2)
    sizes = [len(file.text.encode()) for file in files]
    rng = random.Random(f"bootstrap:{seed}")
    everything = range(len(files))
    samples = [rng.choices(everything, k=len(files)) for _ in range(_RESAMPLES)]
    rates = sorted(sum(bits[i] for i in sample) / sum(sizes[i] for i in sample) for sample in samples)
    low, high = rates[round(0.025 * (_RESAMPLES - 1))], rates[round(0.975 * (_RESAMPLES - 1))]
    return Compression(len(files), sum(sizes), sum(bits) / sum(sizes), low, high)


def format_table(evaluation: Evaluation) -> str:
    """Lay an evaluation out as text, one line a measure."""
    lines = [f"{'task':<16}{'n':>6}{'correct':>9}{'accuracy':>10}   95 % interval"]
    rows = dict(evaluation.tasks)
    if evaluation.valid_json is not None:
        rows["valid JSON"] = evaluation.valid_json
    for name, score in rows.items():
        interval = f"{score.low:.1%} to {score.high:.1%}"
        lines.append(f"{name:<16}{score.n:>6}{score.correct:>9}{score.accuracy:>10.1%}   {interval}")
    if (found := evaluation.compression) is not None:
        lines.append(
            f"bits per byte {found.bits_per_byte:.3f} ({found.low:.3f} to {found.high:.3f}) "
            f"on {found.files} held-out files, {found.bytes} bytes"
        )
    return "\n".join(lines)


def _score(judge: Callable[[tasks.Task, str], bool], asked: Sequence[tasks.Task], answers: Sequence[str]) -> Score:
    return Score.of(sum(judge(task, answer) for task, answer in zip(asked, answers, strict=True)), len(asked))
