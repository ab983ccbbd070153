"""The whole path in one minute: start a server with the built-in model, ask it a dozen things at once, stop it.

The requests go through the `openai` client as any program's would. Four of them share a long beginning, so the server
computes it once and finds it in its prefix cache for the others. Exits with 0 when every request was answered and the
server stopped cleanly; a wrong answer is shown, not an error, because the model is tiny.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import openai
from rich.console import Console
from rich.table import Table

from tokenmill.models.demo.tasks import WORDS, Task, generate, is_correct

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
console = Console(highlight=False)


class DemoFailed(Exception):
    """The demo could not do what it shows; the message says why."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """One request with its figures, as its client measured them."""

    task: Task
    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float
    """From sending the request to the first piece of text."""
    total_s: float

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.total_s - self.ttft_s) / max(1, self.completion_tokens - 1)


class Server:
    """`tokenmill serve` as a subprocess; `log` is everything it printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log: list[str] = []
        self._url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.log.append(line.decode(errors="replace").rstrip())
            if not self._url.done() and (found := re.search(r"https?://[\w.:\[\]-]+:\d+", self.log[-1])):
                self._url.set_result(found[0])
        if not self._url.done():
            self._url.set_exception(DemoFailed("The server ended before it was ready."))
            self._url.exception()  # seen: after a timeout nobody waits for it any more

    async def url(self) -> str:
        """Where it listens; waits until it says so."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._url), START_TIMEOUT_S)
        except TimeoutError:
            raise DemoFailed(f"The server was not ready after {START_TIMEOUT_S:.0f} s.") from None

    async def stop(self) -> None:
        """Asks it to end (SIGTERM) and checks that it does, with exit code 0."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = await asyncio.wait_for(self.process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            self.process.kill()
            raise DemoFailed(f"The server did not stop within {STOP_TIMEOUT_S:.0f} s of SIGTERM.") from None
        await self._reader
        if code != 0:
            raise DemoFailed(f"The server ended with exit code {code}.")


@asynccontextmanager
async def served() -> AsyncIterator[str]:
    """A running server's URL; its log is shown when something goes wrong."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tokenmill", "serve", "demo", "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    server = Server(process)
    try:
        with console.status("Starting the server ..."):
            url = await server.url()
        yield url
        await server.stop()
        console.print("The server stopped on SIGTERM with exit code 0.")
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        console.print("[bold]The server's log:[/bold]")
        console.print("\n".join(server.log) or "(empty)", markup=False)
        raise


def questions() -> list[Task]:
    """A dozen tasks of different lengths; the first four ask about the same long list."""
    rng = random.Random(7)
    pairs = {word: str(rng.randint(100, 999)) for word in rng.sample(WORDS, 48)}
    listing = "\n".join(f"{key}: {value}" for key, value in pairs.items())
    asked = [
        Task(
            "lookup",
            ({"role": "user", "content": f"{listing}\n\nWhat is the value of {key}?"},),
            (),
            pairs[key],
        )
        for key in rng.sample(list(pairs), 4)
    ]
    for kind, count in (("add", 2), ("subtract", 1), ("copy", 2), ("reverse", 1), ("extract_json", 2)):
        asked += generate(kind, 7, count)
    return asked


async def ask(client: openai.AsyncOpenAI, task: Task) -> Answered:
    """Sends one streamed chat request and measures it."""
    started, first = time.perf_counter(), None
    text, usage = "", None
    chunks = await client.chat.completions.create(
        model="demo",
        messages=list(task.messages),  # type: ignore[arg-type]
        temperature=0,
        max_tokens=160,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in chunks:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            text += chunk.choices[0].delta.content
    ended = time.perf_counter()
    if usage is None:
        raise DemoFailed("A stream ended without its usage.")
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details else 0
    return Answered(
        task, text, usage.prompt_tokens, cached, usage.completion_tokens, (first or ended) - started, ended - started
    )


def show(answers: Sequence[Answered], wall_s: float) -> None:
    """Prints the answers, then the figures of each request and of all together."""
    for number, each in enumerate(answers, 1):
        mark = "[green]right[/green]" if is_correct(each.task, each.text) else "[red]wrong[/red]"
        question = each.task.messages[-1]["content"].splitlines()[-1]
        console.print(f"[bold]{number:>2} {each.task.kind}[/bold] {mark}")
        console.print(f"   asked    {question[:100]}", markup=False)
        console.print(f"   answered {each.text.strip()[:100]}", markup=False)
    table = Table(title="The same requests in numbers", caption="prompt, cached and new are tokens")
    table.add_column("request", no_wrap=True)
    for column in ("prompt", "cached", "new", "TTFT ms", "ms/token", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, each in enumerate(answers, 1):
        table.add_row(
            f"{number} {each.task.kind}",
            *(str(each.prompt_tokens), str(each.cached_tokens), str(each.completion_tokens)),
            *(f"{each.ttft_s * 1000:.0f}", f"{each.tpot_s * 1000:.1f}"),
            f"{each.completion_tokens / each.total_s:.1f}",
        )
    prompt, cached = sum(each.prompt_tokens for each in answers), sum(each.cached_tokens for each in answers)
    made = sum(each.completion_tokens for each in answers)
    right = sum(is_correct(each.task, each.text) for each in answers)
    table.add_section()
    table.add_row(f"all in {wall_s:.1f} s", str(prompt), str(cached), str(made), "", "", f"{made / wall_s:.1f}")
    console.print(table)
    console.print(f"{right} of {len(answers)} right. {cached} of {prompt} prompt tokens came from the prefix cache.")


async def demo() -> None:
    """Start, ask, show, stop."""
    async with served() as url:
        console.print(f"The server is ready on {url}, for any OpenAI client.")
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            asked = questions()
            with console.status(f"Asking {len(asked)} things at once ..."):
                started = time.perf_counter()
                answers = await asyncio.gather(*(ask(client, task) for task in asked))
                wall_s = time.perf_counter() - started
        show(answers, wall_s)


def main() -> int:
    """Exit code of the demo."""
    try:
        asyncio.run(demo())
    except (DemoFailed, openai.OpenAIError) as error:
        console.print(f"The demo failed: {error}", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
