"""/v1/files: what batches read and write.

Source: https://platform.openai.com/docs/api-reference/files
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse

from tokenmill.errors import RequestError
from tokenmill.server.batch.backlog import backlog_of
from tokenmill.server.batch.files import BATCH_FILES_KEPT_S
from tokenmill.server.lists import listed
from tokenmill.server.openapi import documented
from tokenmill.server.principal import principal_of
from tokenmill.server.schemas.batches import FileExpiry
from tokenmill.server.schemas.request import parse
from tokenmill.types import JSON

ROUTER = APIRouter()

_UPLOAD: JSON = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string"},
                        "expires_after[anchor]": {"type": "string"},
                        "expires_after[seconds]": {"type": "string"},
                    },
                }
            }
        },
    }
}


@ROUTER.post("/v1/files", **documented(None, 400, 503, openapi_extra=_UPLOAD))
async def upload(request: Request) -> JSON:
    """Keeps a file."""
    files = backlog_of(request).files
    async with request.form(max_files=1, max_fields=8) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise RequestError("missing_parameter", "file is missing; send it as multipart/form-data.", "file")
        purpose = form.get("purpose")
        if not isinstance(purpose, str):
            raise RequestError("missing_parameter", "purpose is missing.", "purpose")
        files.checked_purpose(purpose)
        expires_s = _expiry(form, purpose)
        owner = principal_of(request).key_id
        return await asyncio.to_thread(files.save, file.file, file.filename or "", purpose, owner, expires_s)


def _expiry(form: FormData, purpose: str) -> int | None:
    """In how many seconds an uploaded file is deleted."""
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return BATCH_FILES_KEPT_S if purpose == "batch" else None
    number = int(seconds) if isinstance(seconds, str) and seconds.isdecimal() else seconds
    given = {"anchor": str(anchor), "seconds": number if isinstance(number, int) else str(number)}
    return parse(FileExpiry, msgspec.json.encode({"expires_after": given})).expires_after.seconds


@ROUTER.get("/v1/files", **documented(None, 400, 404, 503))
async def list_files(
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str = "",
) -> JSON:
    """The files of whoever asks."""
    files, owner = backlog_of(request).files, principal_of(request).key_id
    page = await asyncio.to_thread(files.page, owner, after, limit, order, purpose)
    return listed([stored.body for stored in page.items], page.has_more)


@ROUTER.get("/v1/files/{file_id}", **documented(None, 404, 503))
async def retrieve_file(request: Request, file_id: str) -> JSON:
    """What is known about a file."""
    stored = await asyncio.to_thread(backlog_of(request).files.get, file_id, principal_of(request).key_id)
    return stored.body


@ROUTER.get("/v1/files/{file_id}/content", response_class=FileResponse, **documented(None, 404, 503))
async def file_content(request: Request, file_id: str) -> FileResponse:
    """The bytes of a file."""
    files = backlog_of(request).files
    stored = await asyncio.to_thread(files.get, file_id, principal_of(request).key_id)
    return FileResponse(
        files.path(stored.id),
        media_type="application/octet-stream",  # and nothing that a browser would run
        filename=stored.body["filename"],
        headers={"x-content-type-options": "nosniff"},
    )


@ROUTER.delete("/v1/files/{file_id}", **documented(None, 404, 503))
async def delete_file(request: Request, file_id: str) -> JSON:
    """Deletes a file. A batch that still reads it fails when the server starts anew."""
    await asyncio.to_thread(backlog_of(request).files.delete, file_id, principal_of(request).key_id)
    return {"id": file_id, "object": "file", "deleted": True}
