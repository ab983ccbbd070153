"""Answer one prompt.

The answer streams to stdout as it is made; everything else goes to stderr, so that the output can be piped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from tokenmill.cli.command import Command
from tokenmill.cli.sampling import Sampling
from tokenmill.cli.terminal import load, stream
from tokenmill.engine.config import EngineConfig
from tokenmill.errors import EngineError
from tokenmill.text.chat import encode_chat

__all__ = ["COMMAND"]


def run(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from stdin.")],
    engine: EngineConfig,
    sampling: Sampling,
    system: Annotated[str, typer.Option(help="System message to put before the prompt.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer and its figures as JSON.")] = False,
) -> int:
    """Answer one prompt; the answer streams to stdout."""
    text = sys.stdin.read() if prompt == "-" else prompt
    params = sampling.params()
    llm = load(engine)
    asked: str | list[int] = text
    if not raw:
        before = [{"role": "system", "content": system}] if system else []
        asked = encode_chat(llm.tokenizer, [*before, {"role": "user", "content": text}])
    answer = stream(llm.stream(asked, params), (lambda _: None) if as_json else _write)
    if as_json:
        print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False))
    else:
        print()
    if answer.finish_reason is None:
        raise KeyboardInterrupt
    if answer.finish_reason == "error":
        raise EngineError("engine_failed", "The engine failed before the answer was complete.")
    return 0


def _write(text: str) -> None:
    print(text, end="", flush=True)


COMMAND = Command(run, common=("model", "max_model_len", "max_tokens", "temperature", "top_p", "seed", "stop"))
