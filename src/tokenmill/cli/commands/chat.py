"""Talk to a model in the terminal.

The conversation is kept, and because its beginning never changes, each turn finds the turns before it in the prefix
cache. Ctrl-C stops an answer, Ctrl-D ends the chat.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenmill.cli.command import Command
from tokenmill.cli.sampling import Sampling
from tokenmill.cli.terminal import Answer, load, notes, stream
from tokenmill.engine.config import EngineConfig
from tokenmill.errors import TokenmillError
from tokenmill.llm import LLM
from tokenmill.text.chat import encode_chat
from tokenmill.types import SamplingParams

__all__ = ["COMMAND", "Chat"]


class Chat:
    """One conversation. Words that begin with a slash are for the chat itself, everything else is for the model.

    Args:
        write: takes the pieces of an answer; `tell` takes lines about it.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str, write: Callable[[str], None], tell: Callable[[str], None]
    ) -> None:
        self._llm, self._params, self._system = llm, params, system
        self._write, self._tell = write, tell
        self.turns: list[dict[str, Any]] = []
        self.answers: list[Answer] = []
        self._commands: dict[str, tuple[Callable[[str], bool], str]] = {
            "/reset": (self._reset, "forget the conversation"),
            "/system": (self._set_system, "TEXT: set the system message and start over"),
            "/save": (self._save, "FILE: write the conversation as JSON"),
            "/stats": (self._stats, "how fast the answers were"),
            "/help": (self._help, "this list"),
            "/exit": (self._exit, "leave (or Ctrl-D)"),
        }

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as the model gets it."""
        return ([{"role": "system", "content": self._system}] if self._system else []) + self.turns

    def say(self, line: str) -> bool:
        """Takes one line; False when it asked to leave."""
        word, _, rest = line.strip().partition(" ")
        if word.startswith("/"):
            action, _ = self._commands.get(word, (self._unknown, ""))
            return action(rest.strip())
        if word:
            self._ask(line.strip())
        return True

    def _ask(self, text: str) -> None:
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = stream(self._llm.stream(encode_chat(self._llm.tokenizer, asked), self._params), self._write)
        except TokenmillError as error:  # the turn is not kept, so the next one can be shorter
            self._tell(f"error[{error.code}]: {error}")
            return
        self._write("\n")
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
        self.answers.append(answer)
        self._tell(answer.summary())

    def _reset(self, _: str) -> bool:
        self.turns.clear()
        self._tell("The conversation starts over.")
        return True

    def _set_system(self, text: str) -> bool:
        self._system = text
        return self._reset(text)

    def _save(self, name: str) -> bool:
        if not name:
            self._tell("Say where: /save FILE")
            return True
        try:
            Path(name).expanduser().write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n")
        except OSError as error:
            self._tell(f"Not saved: {error}")
        else:
            self._tell(f"Saved {len(self.messages)} messages to {name}.")
        return True

    def _stats(self, _: str) -> bool:
        if not self.answers:
            self._tell("No answer yet.")
            return True
        first = statistics.median(answer.ttft_s for answer in self.answers) * 1000
        speed = statistics.median(answer.tokens_per_s for answer in self.answers)
        prompt = sum(answer.prompt_tokens for answer in self.answers)
        cached = sum(answer.cached_tokens for answer in self.answers)
        made = sum(answer.completion_tokens for answer in self.answers)
        self._tell(
            f"{len(self.answers)} answers, {made} tokens; median {speed:.1f} tokens/s, first after {first:.0f} ms; "
            f"{cached} of {prompt} prompt tokens came from the cache"
        )
        return True

    def _help(self, _: str) -> bool:
        for word, (_action, meaning) in self._commands.items():
            self._tell(f"{word:<8} {meaning}")
        return True

    def _exit(self, _: str) -> bool:
        return False

    def _unknown(self, _: str) -> bool:
        self._tell("There is no such command.")
        return self._help("")


def run(
    engine: EngineConfig,
    sampling: Sampling,
    system: Annotated[str, typer.Option(help="System message.")] = "",
) -> int:
    """Talk to a model in the terminal."""
    params = sampling.params()
    llm = load(engine)
    chat = Chat(llm, params, system, _write, lambda line: notes.print(line, style="dim", markup=False))
    notes.print(f"{engine.model.model} is ready. /help lists the commands, Ctrl-D leaves.", style="dim", markup=False)
    read = _reader()
    try:
        while chat.say(read("> ")):
            pass
    except EOFError:
        notes.print()
    return 0


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _reader() -> Callable[[str], str]:
    """Reads a line with editing and history where prompt_toolkit is installed and a person types; else plainly."""
    try:
        import prompt_toolkit
    except ModuleNotFoundError:
        return input
    return prompt_toolkit.PromptSession[str]().prompt if notes.is_terminal else input


COMMAND = Command(run, common=("model", "max_model_len", "max_tokens", "temperature", "top_p", "seed"))
