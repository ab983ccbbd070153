"""Writes what a model says as a Responses answer: its typed events, and the response that they add up to.

Source: https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

from tokenmill.errors import EngineError, RequestError, TokenmillError
from tokenmill.server.conversation.dialogue import Dialogue
from tokenmill.server.conversation.items import new_id
from tokenmill.server.errors import status_of
from tokenmill.server.generation import check_output
from tokenmill.server.logprobs import chat_logprobs
from tokenmill.text.dialect import Content, Delta, Reasoning, ToolArguments, ToolCall
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import JSON, CompletionOutput, FinishReason, RequestOutput

__all__ = ["FINAL", "ResponseWriter"]

FINAL = ("completed", "incomplete", "failed", "cancelled")
"""Statuses of a response that has ended."""


class ResponseWriter:
    """One response while it grows. Events are numbered in the order in which they are taken.

    Args:
        head: the response's fields; those that grow are filled in here.
        block_size: of the prefix cache, in tokens.
        more: what the response tells besides when it is complete.
    """

    def __init__(
        self,
        head: JSON,
        dialogue: Dialogue,
        tokenizer: Tokenizer,
        block_size: int,
        more: Callable[[RequestOutput], JSON],
    ) -> None:
        self.response: JSON = head | {
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            "completed_at": None,
        }
        self._dialogue = dialogue
        self._parser = dialogue.parser()
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._more = more
        self._sequence = 0
        self._open: JSON | None = None
        """The item that is being written; the last of the output."""
        self._logprobs: list[JSON] = []
        """Of tokens whose text is held back."""
        self._generated = self._reasoned = 0
        self.begun = False
        """Whether any event was written."""

    def ended(self) -> bool:
        """Whether the last event was written."""
        return self.response["status"] in FINAL

    def queue(self) -> Iterator[JSON]:
        """Begins a response that nobody waits for."""
        self.begun = True
        self.response["status"] = "queued"
        yield self._lifecycle("created")
        yield self._lifecycle("queued")

    def push(self, output: RequestOutput) -> Iterator[JSON]:
        """The events of one increment.

        Raises:
            EngineError: the engine failed; `fail` writes the last event then.
        """
        [completion] = output.outputs
        check_output(completion)
        if completion.finish_reason is FinishReason.ABORT:
            raise EngineError("aborted", "The request was given up before its end.")
        if not self.begun:
            self.begun = True
            yield self._lifecycle("created")
        if self.response["status"] == "queued" or self._sequence == 1:
            self.response["status"] = "in_progress"
            yield self._lifecycle("in_progress")
        self._generated += len(completion.token_ids)
        if completion.logprobs is not None:
            self._logprobs += chat_logprobs(self._tokenizer, completion.logprobs)["content"]
        deltas = self._parser.push(completion.text)
        if completion.finish_reason is not None:
            deltas += self._parser.finish()
        for delta in deltas:
            yield from self._write(delta)
        if completion.finish_reason is not None:
            yield from self._end(output, completion)

    def fail(self, error: TokenmillError) -> JSON:
        """The last event of a response that failed. Items that were open stay so."""
        status = status_of(error)
        code = "rate_limit_exceeded" if status == 429 else "server_error"
        if isinstance(error, RequestError) and status < 429:
            code = "invalid_prompt"
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": error.message, "type": error.code, "param": error.field}
        self._leave_open()
        return self._lifecycle("failed")

    def cancel(self) -> JSON:
        """The last event of a response that was given up by its owner."""
        self._leave_open()
        self.response["status"] = "cancelled"
        return self._lifecycle("incomplete")  # there is no event of its own

    def _leave_open(self) -> None:
        if self._open is not None:
            self._open["status"] = "incomplete"
            self._open = None

    def _end(self, output: RequestOutput, completion: CompletionOutput) -> Iterator[JSON]:
        if not self.response["output"]:
            yield from self._begin("message")  # an empty answer is one all the same
        cut = completion.finish_reason is FinishReason.LENGTH
        yield from self._close("incomplete" if cut else "completed")
        prompt, cached = len(output.prompt_token_ids), output.cached_tokens
        self.response["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": max(0, prompt // self._block_size * self._block_size - cached),
            },
            "output_tokens": self._generated,
            "output_tokens_details": {"reasoning_tokens": self._reasoned},
            "total_tokens": prompt + self._generated,
        }
        self.response |= self._more(output)
        if cut:
            self.response["status"] = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["status"] = "completed"
            self.response["completed_at"] = int(time.time())
        yield self._lifecycle(self.response["status"])

    def _write(self, delta: Delta) -> Iterator[JSON]:
        match delta:
            case Content(text):
                yield from self._begin("message")
                logprobs, self._logprobs = self._logprobs, []
                part = self._item["content"][0]
                part["text"] += text
                part["logprobs"] += logprobs
                yield self._of_part("response.output_text.delta", delta=text, logprobs=logprobs)
            case Reasoning(text):
                yield from self._begin("reasoning")
                self._logprobs.clear()  # they are told of text only
                self._reasoned += len(self._tokenizer.encode(text, add_special_tokens=False))
                self._item["content"][0]["text"] += text
                yield self._of_part("response.reasoning_text.delta", delta=text)
            case ToolCall(_, call_id, name):
                yield from self._close("completed")
                yield from self._begin("function_call", call_id=call_id, name=name, arguments="")
                self._logprobs.clear()
            case ToolArguments(_, text):
                self._item["arguments"] += text
                self._logprobs.clear()
                yield self._of_item("response.function_call_arguments.delta", delta=text)

    def _begin(self, kind: str, **fields: Any) -> Iterator[JSON]:
        """Opens an item of this type, unless one is."""
        if self._open is not None and self._open["type"] == kind:
            return
        yield from self._close("completed")
        item: JSON = {"id": new_id(kind), "type": kind, "status": "in_progress", **fields}
        part: JSON | None = None
        if kind == "message":
            item |= {"role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        self.response["output"].append(item)
        self._open = item
        yield self._event("response.output_item.added", output_index=self._index, item=copy.deepcopy(item))
        if part is not None:
            item["content"].append(part)
            yield self._of_part("response.content_part.added", part=copy.deepcopy(part))

    def _close(self, status: str) -> Iterator[JSON]:
        """Ends the item that is open, if one is."""
        item = self._open
        if item is None:
            return
        match item["type"]:
            case "message":
                part = item["content"][0]
                yield self._of_part("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
                yield self._of_part("response.content_part.done", part=part)
            case "reasoning":
                part = item["content"][0]
                yield self._of_part("response.reasoning_text.done", text=part["text"])
                yield self._of_part("response.content_part.done", part=part)
            case _:
                done = "response.function_call_arguments.done"
                yield self._of_item(done, name=item["name"], arguments=item["arguments"])
        item["status"] = status
        self._open = None
        yield self._event("response.output_item.done", output_index=self._index, item=item)

    @property
    def _item(self) -> JSON:
        assert self._open is not None
        return self._open

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _of_part(self, kind: str, **fields: Any) -> JSON:
        return self._of_item(kind, content_index=0, **fields)

    def _of_item(self, kind: str, **fields: Any) -> JSON:
        return self._event(kind, item_id=self._item["id"], output_index=self._index, **fields)

    def _lifecycle(self, status: str) -> JSON:
        return self._event(f"response.{status}", response=self.response)

    def _event(self, kind: str, **fields: Any) -> JSON:
        """An event; it must be encoded before the next one is taken, since what it holds goes on growing."""
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event
