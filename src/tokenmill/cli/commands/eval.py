"""Measure how accurate a model is on the built-in tasks.

Each accuracy comes with its 95 % interval; the tasks depend on the seed alone, so two models are asked the same. With
``--quantize`` or ``--kv-dtype`` the model as it is is measured too, and with ``--against`` another one, and the two are
compared.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import rich
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tokenmill.bench import evaluate
from tokenmill.cli.command import Command
from tokenmill.cli.terminal import load, notes
from tokenmill.engine.config import EngineConfig
from tokenmill.errors import ConfigError, did_you_mean
from tokenmill.llm import LLM
from tokenmill.models.config import ModelConfig
from tokenmill.models.demo import corpus
from tokenmill.text.chat import encode_chat
from tokenmill.types import RequestOutput, SamplingParams

__all__ = ["COMMAND", "Evaluated", "divergence"]

_AT_ONCE = 64
"""Requests handed over in one call: enough to fill a batch, few enough for the bar to move."""

_LIKELIEST = 64
"""Tokens whose probabilities are compared at each place of a text."""

_ROUNDING = ("quantize", "quantize_head", "activations")
"""Options that the model compared with is without."""

_COMPARED = 24
"""Windows of text that two models are compared on: 24,000 places say the mean to a few per cent."""


class Evaluated:
    """An `LLM` as `bench.evaluate` asks for a model; every call shows a line in `bar`.

    Args:
        context: longest window, in tokens, that bits per byte are measured with.
    """

    def __init__(self, llm: LLM, context: int, bar: Progress) -> None:
        self._llm, self._bar = llm, bar
        self.context = context
        # Where a model has no token that begins a text, the one that ends a document stands before the next.
        begin = llm.tokenizer.special_tokens.get("bos_token")
        known = llm.tokenizer.encode(begin, add_special_tokens=False) if begin else llm.tokenizer.eos_token_ids
        self.start_token: int = known[-1]

    def chat(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        tools: Sequence[Sequence[dict[str, Any]]],
        max_tokens: int,
    ) -> list[str]:
        """Greedy answers as raw text, tool calls as the model writes them, in order."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        asked = [
            encode_chat(self._llm.tokenizer, list(messages), list(offered) or None)
            for messages, offered in zip(conversations, tools, strict=True)
        ]
        return [output.outputs[0].text for output in self._answered("answers", asked, params)]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, nothing added."""
        return self._llm.tokenizer.encode(text, add_special_tokens=False)

    def logprobs(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural-log probability of every token after the first, per sequence."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        return [
            _chosen(output) for output in self._answered("windows of text", [list(ids) for ids in token_ids], params)
        ]

    def likeliest(self, token_ids: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """At every place of all sequences, the likeliest next tokens with their natural-log probabilities."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=_LIKELIEST)
        return [
            dict(zip(entry.token_ids, entry.logprobs, strict=True))
            for output in self._answered("places compared", [list(ids) for ids in token_ids], params)
            for entry in output.prompt_logprobs or []
            if entry is not None
        ]

    def _answered(self, what: str, prompts: list[list[int]], params: SamplingParams) -> Iterator[RequestOutput]:
        line = self._bar.add_task(what, total=len(prompts))
        for start in range(0, len(prompts), _AT_ONCE):
            batch = prompts[start : start + _AT_ONCE]
            yield from self._llm.generate(batch, params)
            self._bar.advance(line, len(batch))


def _chosen(output: RequestOutput) -> list[float]:
    return [entry.logprobs[0] for entry in output.prompt_logprobs or [] if entry is not None]


def divergence(base: Sequence[dict[int, float]], other: Sequence[dict[int, float]]) -> float:
    """Mean Kullback-Leibler divergence of `other` from `base` in nats.

    Of each place some tokens' log probabilities are known. Those that only one side knows count as one token, so the
    result is a lower bound, near the truth when what is known is nearly all.
    """
    total = 0.0
    for p, q in zip(base, other, strict=True):
        both = p.keys() & q.keys()
        total += math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
        rest_p, rest_q = (max(1e-9, 1 - math.fsum(math.exp(known[token]) for token in both)) for known in (p, q))
        total += rest_p * math.log(rest_p / rest_q)
    return total / len(base) if base else 0.0


@dataclasses.dataclass(frozen=True)
class _Measured:
    """One model: its evaluation, and the likeliest tokens where two are compared."""

    result: evaluate.Evaluation
    likeliest: list[dict[int, float]]


def run(
    engine: EngineConfig,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Tasks of each kind.")] = 200,
    task: Annotated[list[str] | None, typer.Option(help="A kind of task; several allowed. All by default.")] = None,
    files: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Held-out files for bits per byte. All by default.")
    ] = None,
    context: Annotated[int, typer.Option(min=2, metavar="N", help="Longest window for bits per byte.")] = 1024,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare with this model, such as the one it was made from.")
    ] = None,
    eval_seed: Annotated[int, typer.Option(metavar="N", help="Decides which tasks are asked.")] = evaluate.SEED,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Measure how accurate a model is on the built-in tasks, with 95 % intervals."""
    kinds = tuple(task or evaluate.KINDS)
    for kind in kinds:
        if kind not in evaluate.KINDS:
            raise ConfigError(
                "unknown_choice", f"There is no task {kind!r}. {did_you_mean(kind, evaluate.KINDS)}", "task"
            )
    held_out = list(corpus.held_out_files())[:files]
    unrounded: dict[str, Any] = {name: getattr(ModelConfig, name) for name in _ROUNDING}
    original = dataclasses.replace(engine.model, model=against or engine.model.model, **unrounded)
    plain = dataclasses.replace(engine, model=original, cache=dataclasses.replace(engine.cache, kv_dtype="auto"))
    compared = engine != plain

    def measure(config: EngineConfig) -> _Measured:
        llm = load(config)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=notes) as bar:
            model = Evaluated(llm, context, bar)
            result = evaluate.evaluate(model, n=n, seed=eval_seed, kinds=kinds, files=held_out)
            texts = held_out[:: -(-len(held_out) // _COMPARED)] if compared else []
            windows = [[model.start_token, *model.encode(file.text)[: context - 1]] for file in texts]
            return _Measured(result, model.likeliest(windows))

    measured = measure(engine)
    told: dict[str, Any] = {
        "model": engine.model.model,
        **{name: getattr(engine.model, name) for name in _ROUNDING},
        "kv_dtype": engine.cache.kv_dtype,
        **dataclasses.asdict(measured.result),
    }
    tables = [_table(measured.result, _which(engine) if compared else "")]
    if compared:
        base = measure(plain)
        told["against"] = {"model": original.model, **dataclasses.asdict(base.result)}
        told["kl_nats"] = divergence(base.likeliest, measured.likeliest)
        told["relative_loss"] = _loss(base.result, measured.result)
        tables = [_table(base.result, _which(plain)), *tables]
    if as_json:
        print(json.dumps(told))
        return 0
    for table in tables:
        rich.print(table)
    if compared:
        bits = "" if told["relative_loss"] is None else f"{told['relative_loss']:+.2%} bits per byte, "
        rich.print(f"{bits}KL divergence {told['kl_nats']:.4f} nats per token")
    return 0


def _which(engine: EngineConfig) -> str:
    model, kv = engine.model, engine.cache.kv_dtype
    said = [model.model if model.quantize == "none" else f"{model.model} in {model.quantize}"]
    if model.quantize_head != ModelConfig.quantize_head:
        said.append(f"{model.quantize_head} head")
    if model.activations != ModelConfig.activations:
        said.append(f"{model.activations} activations")
    if kv != "auto":
        said.append(f"KV in {kv}")
    return escape(", ".join(said))


def _loss(base: evaluate.Evaluation, other: evaluate.Evaluation) -> float | None:
    """By what share the bits per byte of `other` exceed those of `base`."""
    if base.compression is None or other.compression is None:
        return None
    return other.compression.bits_per_byte / base.compression.bits_per_byte - 1


def _table(result: evaluate.Evaluation, which: str) -> Table:
    table = Table(title=f"Built-in tasks, {which}" if which else "Built-in tasks")
    for column in ("task", "n", "correct", "accuracy", "95 % interval"):
        table.add_column(column, justify="left" if column == "task" else "right")
    rows = dict(result.tasks)
    if result.valid_json is not None:
        rows["valid JSON"] = result.valid_json
    for name, score in rows.items():
        interval = f"{score.low:.1%} to {score.high:.1%}"
        table.add_row(name, str(score.n), str(score.correct), f"{score.accuracy:.1%}", interval)
    if (found := result.compression) is not None:
        table.caption = (
            f"{found.bits_per_byte:.3f} bits per byte ({found.low:.3f} to {found.high:.3f}) on {found.files} held-out "
            f"files of {found.bytes} bytes"
        )
    return table


COMMAND = Command(
    run, common=("model", "dtype", "quantize", "quantize_head", "activations", "kv_dtype", "threads", "max_num_seqs")
)
