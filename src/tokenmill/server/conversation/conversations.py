"""Tells a client when its conversation lost its cached prefix, where, and why.

The last request of each conversation is remembered, in bounded memory. A request belongs to the conversation with which
it shares an answer of the model or, failing that, the first message of the user: so it is found again also when its
system prompt or tools have changed, or its oldest messages were dropped, which are the very cases to explain.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from tokenmill.llm import AsyncLLM
from tokenmill.server.call import Call, Outcome
from tokenmill.text.drift import Conversation, Drift, compare
from tokenmill.types import JSON, RequestOutput

__all__ = ["Conversations", "cache_report"]

_logger = logging.getLogger(__name__)

_MOST_TOKENS = 2_000_000
"""Kept for all conversations together: 16 MB."""
_MOST_REQUESTS = 4096


@dataclasses.dataclass(frozen=True)
class _Remembered:
    request_id: str
    conversation: Conversation | None
    token_ids: array[int]
    keys: tuple[bytes, ...]


class Conversations:
    """Compares each request with the one before it. An interceptor of calls."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._by_key: dict[bytes, str] = {}
        self._requests: OrderedDict[str, _Remembered] = OrderedDict()
        self._tokens = 0

    async def begin(self, call: Call) -> None:
        """Puts the comparison into ``call.report["prefix"]`` when there is an earlier request."""
        ids = array("q", call.prompt_token_ids)
        conversation = _conversation(call)
        keys = tuple(_keys(call))
        earlier = self._find(keys)
        self._remember(_Remembered(call.request_id, conversation, ids, keys))
        if earlier is None:
            return
        drift = Drift(len(earlier.token_ids), 0, "none", "nothing changed")
        if ids[: len(earlier.token_ids)] != earlier.token_ids:
            drift = await asyncio.to_thread(
                compare, self._llm.tokenizer, earlier.conversation, earlier.token_ids, conversation, ids
            )
        call.report["prefix"] = _as_json(earlier.request_id, drift)
        if drift.cause != "none":
            _logger.info("request %s %s", call.request_id, drift)

    def end(self, call: Call, outcome: Outcome) -> None:
        pass

    def _find(self, keys: tuple[bytes, ...]) -> _Remembered | None:
        for key in keys:
            found = self._requests.get(self._by_key.get(key, ""))
            if found is not None:
                return found
        return None

    def _remember(self, request: _Remembered) -> None:
        self._requests[request.request_id] = request
        self._tokens += len(request.token_ids)
        for key in request.keys:
            self._by_key[key] = request.request_id
        while self._tokens > _MOST_TOKENS or len(self._requests) > _MOST_REQUESTS:
            _, oldest = self._requests.popitem(last=False)
            self._tokens -= len(oldest.token_ids)
            for key in oldest.keys:
                if self._by_key.get(key) == oldest.request_id:
                    del self._by_key[key]


def cache_report(call: Call, last: RequestOutput) -> JSON:
    """What a client learns that asks for it, once the engine has told all about its request in the `last` output."""
    report: JSON = {
        "prompt_tokens": len(call.prompt_token_ids),
        "cached_tokens": last.cached_tokens,
        "uncached_tokens_by_reason": last.stats[0].misses if last.stats else {},
    }
    unknown: JSON = {"previous_request": None, "explanation": "no earlier request of this conversation is known"}
    prefix: JSON = call.report.get("prefix", unknown)
    return report | prefix


def _as_json(previous: str, drift: Drift) -> JSON:
    return {
        "previous_request": previous,
        "shared_tokens": drift.shared_tokens,
        "lost_tokens": drift.lost_tokens,
        "cause": drift.cause,
        "explanation": str(drift),
        "before": drift.before,
        "after": drift.after,
    }


def _conversation(call: Call) -> Conversation | None:
    messages = call.context.get("messages")
    if messages is None:
        return None
    return Conversation(messages, call.context.get("tools") or (), call.context.get("variables") or {})


def _keys(call: Call) -> Iterator[bytes]:
    """What tells that two requests are of one conversation, the surest first."""
    who = f"{call.principal.key_id}\0{call.tenant}\0"
    if named := call.context.get("conversation"):
        yield _digest(who, "named", named)
    messages = call.context.get("messages") or []
    answers = [message for message in messages if message.get("role") == "assistant"]
    for message in reversed(answers):
        yield _digest(who, "assistant", [message.get("content"), message.get("tool_calls")])
    first = next((message for message in messages if message.get("role") == "user"), None)
    if first is not None:
        yield _digest(who, "user", first.get("content"))


def _digest(who: str, kind: str, content: Any) -> bytes:
    text = f"{who}{kind}\0{json.dumps(content, sort_keys=True, default=str)}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
