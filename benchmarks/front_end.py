"""What serving over HTTP costs the engine: the same work behind the server and through `LLM.generate`, in turns.

    python benchmarks/front_end.py [--model demo|qwen3-0.6b-random] [--requests 256] [--concurrency 128] [--repeats 5]

The server and the library stay loaded in processes of their own and take turns; the ratio of each turn is
generated tokens a second behind HTTP over those of `LLM.generate`. Requests are streamed. The client reads every 20 ms
and looks at nothing but the end of each answer: a real one runs on another machine and takes nothing of this one.
`front_end_share` is the part of the server's processor time that is not the engine's, which other work on the machine
does not change.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import psutil
from common import model_folder, save, spread, token_ids

from tokenmill.config import build
from tokenmill.engine.config import EngineConfig
from tokenmill.llm import LLM
from tokenmill.types import SamplingParams

READ_EVERY_S = 0.02
LETTERS = list(range(64, 91))
"""Only these tokens are generated: of a random model's vocabulary most are no text, and cost the front end nothing."""

END = b"data: [DONE]\n\n"


def prompts(count: int, length: int) -> list[list[int]]:
    return [token_ids(index, length) for index in range(count)]


def library(pipe: Connection, model: str, seqs: int, tokens: int) -> None:
    """Generates whatever prompts come through the pipe; answers with tokens and seconds."""
    llm = LLM(config=build(EngineConfig, {"model": {"model": model}, "scheduler": {"max_num_seqs": seqs}}))
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, allowed_token_ids=LETTERS)
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        began = time.perf_counter()
        outputs = llm.generate(work, params)
        seconds = time.perf_counter() - began
        pipe.send((sum(len(output.outputs[0].token_ids) for output in outputs), seconds))


@contextmanager
def server(model: str, seqs: int) -> Iterator[tuple[tuple[str, int], psutil.Process]]:
    """A server as a user starts it; yields its host and port, and its process."""
    command = [sys.executable, "-m", "tokenmill", "serve", model, "--port", "0", "--max-num-seqs", str(seqs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        host, port = re.search(r"http://(.+):(\d+)", line).groups()
        try:
            yield (host, int(port)), psutil.Process(process.pid)
        finally:
            process.terminate()


def cpu_seconds(process: psutil.Process) -> float:
    """Processor time that it has used."""
    times = process.cpu_times()
    return times.user + times.system


class Stream:
    """One request and the end of its answer."""

    def __init__(self, address: tuple[str, int], prompt: list[int], tokens: int) -> None:
        body = json.dumps({
            "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True,
            "allowed_token_ids": LETTERS,
            "stream_options": {"include_usage": True},
        }).encode()  # fmt: skip
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {address[0]}\r\ncontent-length: {len(body)}\r\n\r\n"
        self.socket = socket.create_connection(address)
        self.socket.sendall(head.encode() + body)
        self.socket.setblocking(False)
        self.bytes = 0
        self.chunks = 0
        self._tail = b""

    def read(self) -> bool:
        """Reads what is there; returns whether the answer is complete."""
        data = self.socket.recv(1 << 20)
        self.bytes += len(data)
        self.chunks += data.count(b"data: {")
        self._tail = (self._tail + data)[-2000:]
        if not data:
            raise RuntimeError(f"the server closed the connection: {self._tail!r}")
        return END in self._tail

    @property
    def tokens(self) -> int:
        """Tokens that the server says it has generated."""
        return int(re.findall(rb'"completion_tokens":(\d+)', self._tail)[-1])


def over_http(address: tuple[str, int], work: list[list[int]], tokens: int, concurrency: int) -> dict[str, float]:
    """Sends all prompts, so many at once; returns what came and how long it took."""
    waiting = list(reversed(work))
    total = {"tokens": 0, "bytes": 0, "chunks": 0}
    began = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        while waiting or selector.get_map():
            while waiting and len(selector.get_map()) < concurrency:
                stream = Stream(address, waiting.pop(), tokens)
                selector.register(stream.socket, selectors.EVENT_READ, stream)
            time.sleep(READ_EVERY_S)
            for key, _ in selector.select():
                stream = key.data
                if stream.read():
                    selector.unregister(stream.socket)
                    stream.socket.close()
                    total = {name: value + getattr(stream, name) for name, value in total.items()}
    return total | {"seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate for each")
    parser.add_argument("--seqs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    model = args.model if args.model == "demo" else str(model_folder(args.model))
    work = prompts(args.requests, args.prompt)

    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=library, args=(theirs, model, args.seqs, args.tokens))
    process.start()
    theirs.close()  # so that its death is noticed
    ours.recv()
    turns = []
    with server(model, args.seqs) as (address, front_end):
        [engine] = front_end.children()
        for repeat in range(args.repeats + 1):
            ours.send(work)
            tokens, seconds = ours.recv()
            before = cpu_seconds(front_end), cpu_seconds(engine)
            http = over_http(address, work, args.tokens, args.concurrency)
            used = cpu_seconds(front_end) - before[0], cpu_seconds(engine) - before[1]
            if http["tokens"] != tokens:
                raise RuntimeError(f"HTTP brought {http['tokens']} tokens and the library {tokens}")
            turn = {
                "library_tokens_s": tokens / seconds,
                "http_tokens_s": http["tokens"] / http["seconds"],
                "front_end_share": used[0] / sum(used),
                "front_end_us_per_token": 1e6 * used[0] / tokens,
                "tokens_per_chunk": http["tokens"] / http["chunks"],
                "bytes_per_token": http["bytes"] / http["tokens"],
            }
            turn["ratio"] = turn["http_tokens_s"] / turn["library_tokens_s"]
            print(turn, file=sys.stderr, flush=True)
            if repeat:  # the first is for warming up
                turns.append(turn)
    ours.send(None)
    process.join()
    result = {name: spread([turn[name] for turn in turns]) for name in turns[0]}
    settings = {name: getattr(args, name) for name in ("model", "requests", "concurrency", "prompt", "tokens", "seqs")}
    if args.no_save:
        print(json.dumps(result, indent=1))
    else:
        save(f"front-end-{args.model}", {"settings": settings, **result})


if __name__ == "__main__":
    main()
