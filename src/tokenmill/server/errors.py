"""Errors as HTTP answers: in OpenAI's form, or in Anthropic's on its own paths.

Source: https://platform.openai.com/docs/guides/error-codes, https://docs.anthropic.com/en/api/errors
"""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response

from tokenmill.errors import EngineError, RequestError, TokenmillError, UnavailableError
from tokenmill.types import JSON

__all__ = ["anthropic_body_of", "body_of", "internal_error", "response_of", "status_of"]

_STATUS = {
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    # The limit was the client's own: a 5xx would be held against the server.
    "deadline_exceeded": 408,
    "body_too_slow": 408,
    "body_too_large": 413,
    "headers_too_large": 431,
    "client_gone": 499,
    "queue_full": 429,
    "invalid_api_key": 401,
    "insufficient_scope": 403,
    "model_not_allowed": 403,
    "key_not_found": 404,
    "rate_limit_exceeded": 429,
    "concurrency_exceeded": 429,
    "tokens_per_day_exceeded": 429,
    "dollars_per_day_exceeded": 429,
}
"""Codes whose status is not that of their class."""

_CLASS_STATUS: tuple[tuple[type[TokenmillError], int], ...] = ((RequestError, 400), (UnavailableError, 503))

_RETRY_AFTER_S = 1
"""Sent with every answer that says "not now": a client asks again at once, but not in a tight loop."""


def status_of(error: TokenmillError) -> int:
    """HTTP status of an error: by code, else by class, else 500."""
    by_class = next((status for cls, status in _CLASS_STATUS if isinstance(error, cls)), 500)
    return _STATUS.get(error.code, by_class)


def body_of(error: TokenmillError) -> JSON:
    """``{"error": {"message", "type", "param", "code"}}``."""
    status = status_of(error)
    if status == 429:
        kind = "rate_limit_error"
    elif status >= 500:
        kind = "server_error"
    else:
        kind = "invalid_request_error"
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": error.code}}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_body_of(error: TokenmillError) -> JSON:
    """``{"type": "error", "error": {"type", "message"}}``; our own code stands beside them."""
    status = status_of(error)
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message, "code": error.code}}


def response_of(error: TokenmillError, path: str) -> Response:
    """The answer to a request to `path` that failed before anything was sent."""
    status = status_of(error)
    seconds = error.retry_after_s if isinstance(error, UnavailableError) else _RETRY_AFTER_S
    headers = {"retry-after": str(math.ceil(seconds))} if status in (429, 503) else None
    body = anthropic_body_of(error) if path.startswith("/v1/messages") else body_of(error)
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def internal_error(request_id: str) -> EngineError:
    """What a client learns about a mistake of ours: nothing but where to find it in the log."""
    return EngineError("internal_error", f"The server failed. Its log says more about request {request_id}.")
