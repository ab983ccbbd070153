"""The served OpenAPI document: what each endpoint takes, and every status it may answer with.

Bodies are read by `tokenmill.server.schemas` and not by the framework, so the document is told about them here, from
the same classes.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from tokenmill.types import JSON

__all__ = ["describe", "documented"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


_STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "There is no key, or it is not known.",
    403: "The key may not do this.",
    404: "There is no such thing.",
    408: "The request took too long.",
    413: "The body is too large.",
    429: "Too much at once; ask again after `Retry-After` seconds.",
    500: "The server failed.",
    503: "Not now; ask again after `Retry-After` seconds.",
}
_OF_EVERY_ENDPOINT = (401, 403, 413, 500)
_OF_EVERY_BODY = (400, 404, 408, 429, 503)
_REF = "#/components/schemas/{model}"


def documented(body: type[BaseModel] | None = None, *statuses: int, **more: Any) -> JSON:
    """Keyword arguments for a route's decorator.

    Args:
        body: what the endpoint takes as JSON.
        statuses: what it may answer beside 200 and those of every endpoint or body.
        more: other arguments of the decorator.
    """
    every = {*_OF_EVERY_ENDPOINT, *(_OF_EVERY_BODY if body is not None else ()), *statuses}
    responses: dict[int, JSON] = {
        status: {"model": ErrorAnswer, "description": _STATUSES[status]} for status in sorted(every)
    }
    described: JSON = {"responses": responses}
    if body is not None:
        if "stream" in body.model_fields:
            responses[200] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
        schema = body.model_json_schema(ref_template=_REF)
        content = {"application/json": {"schema": schema}}
        described["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return described | more


def describe(app: FastAPI) -> JSON:
    """The document of `app`, with the parts of request bodies moved to its components."""
    document = FastAPI.openapi(app)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for operations in document["paths"].values():
        for operation in operations.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                schemas.update(content["schema"].pop("$defs", {}))
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}, {}]
    return document
