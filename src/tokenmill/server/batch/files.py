"""Uploaded files and the files that batches write: bytes in the state folder, everything else in its table.

A file's name on disk is the id that the server gave it. What a client calls it is only ever shown.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import IO

from tokenmill.errors import RequestError, UnavailableError
from tokenmill.server.state import Order, Page, State, Stored
from tokenmill.types import JSON

__all__ = ["BATCH_FILES_KEPT_S", "PURPOSES", "Files", "new_file_id"]

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
"""What a file can be uploaded for."""

BATCH_FILES_KEPT_S = 30 * 86400
"""How long files for batches are kept unless their owner says otherwise."""

_KIND = "file"
_LONGEST_NAME = 255


def new_file_id() -> str:
    """A name for a file."""
    return f"file-{uuid.uuid4().hex}"


class Files:
    """The files of all owners. Its methods wait for the disk."""

    def __init__(self, state: State) -> None:
        self._state = state

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are.

        Args:
            file_id: one that this server made; never what a client sent.
        """
        return self._state.folder / "files" / file_id

    def save(self, content: IO[bytes], name: str, purpose: str, owner: str, expires_s: int | None) -> JSON:
        """Keeps an upload; returns OpenAI's ``file`` object.

        Raises:
            UnavailableError: ``state_unavailable``; nothing of the file is left then.
        """
        file_id = new_file_id()
        path = self.path(file_id)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(content, file, 2**20)
            return self.register(file_id, name, purpose, owner, expires_s)
        except (OSError, UnavailableError) as error:
            with contextlib.suppress(OSError):
                path.unlink()
            if isinstance(error, UnavailableError):
                raise
            raise UnavailableError("state_unavailable", f"The file cannot be written: {error.strerror}.") from error

    def register(self, file_id: str, name: str, purpose: str, owner: str, expires_s: int | None) -> JSON:
        """Makes a file that is on disk known; returns OpenAI's ``file`` object. Again is the same as once."""
        now = int(time.time())
        body: JSON = {
            "id": file_id,
            "object": "file",
            "bytes": self.path(file_id).stat().st_size,
            "created_at": now,
            "expires_at": None if expires_s is None else now + expires_s,
            "filename": _shown(name),
            "purpose": purpose,
            "status": "processed",
            "status_details": None,
        }
        self._state.insert(_KIND, file_id, owner, body, tag=purpose, expires=body["expires_at"])
        return body

    def get(self, file_id: str, owner: str, field: str = "file_id") -> Stored:
        """A file of `owner`.

        Raises:
            RequestError: ``not_found``.
        """
        return self._state.get(_KIND, file_id, owner, field)

    def page(self, owner: str, after: str | None, limit: int, order: Order, purpose: str) -> Page:
        """A part of the owner's files."""
        return self._state.page(_KIND, owner, after=after, limit=limit, order=order, tag=purpose)

    def delete(self, file_id: str, owner: str) -> None:
        """Forgets a file and its bytes.

        Raises:
            RequestError: ``not_found``.
        """
        self._state.delete(_KIND, file_id, owner, "file_id")
        self.path(file_id).unlink(missing_ok=True)

    def checked_purpose(self, purpose: str) -> str:
        """`purpose`, if a file can be uploaded for it.

        Raises:
            RequestError: ``invalid_parameter``.
        """
        if purpose not in PURPOSES:
            raise RequestError("invalid_parameter", f"purpose must be one of {', '.join(PURPOSES)}.", "purpose")
        return purpose


def _shown(name: str) -> str:
    """What the client calls the file, without folders and without what a header cannot hold."""
    last = re.split(r"[/\\]", name)[-1]
    clean = "".join(character for character in last if character.isprintable())[:_LONGEST_NAME].strip()
    return "file" if clean in ("", ".", "..") else clean
