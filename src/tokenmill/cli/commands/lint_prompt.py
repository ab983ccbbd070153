"""Tell what keeps a prompt from being served from the prefix cache.

Reads saved bodies of /v1/chat/completions. The comparison itself is `text/drift.py`, which the server uses as well.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tokenmill.cli.command import Command
from tokenmill.errors import RequestError
from tokenmill.models.folder import resolve
from tokenmill.text.drift import Conversation, compare, volatile
from tokenmill.text.tokenizer import Tokenizer

__all__ = ["COMMAND"]


def run(
    first: Annotated[Path, typer.Argument(help="Saved request: the JSON body of /v1/chat/completions.")],
    second: Annotated[Path | None, typer.Argument(help="The next request of the same conversation.")] = None,
    model: Annotated[
        str, typer.Option(help="Whose template and tokenizer count: demo, a folder, or a hub id.")
    ] = "demo",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> int:
    """Tell where a conversation loses its cached prefix, and why; exit code 1 when it does."""
    tokenizer = Tokenizer.load(resolve(model))
    before = _read(first)
    found: dict[str, Any] = {"volatile": [{"place": place, "text": text} for place, text in volatile(before)]}
    lost = False
    if second is not None:
        after = _read(second)
        old, new = (tokenizer.encode(each.text(tokenizer), add_special_tokens=False) for each in (before, after))
        drift = compare(tokenizer, before, old, after, new)
        lost = drift.cause != "none"
        found |= dataclasses.asdict(drift) | {"explanation": str(drift), "tokens": [len(old), len(new)]}
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(found)
    return 1 if lost or found["volatile"] else 0


def _show(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    for each in found["volatile"]:
        console.print(f"{escape(each['place'])} holds {escape(repr(each['text']))}, which the next request will not.")
    if "cause" in found:
        console.print(f"The second request {escape(found['explanation'])}.")
        if found["cause"] != "none":
            console.print(f"{found['lost_tokens']} tokens of the first are computed again.")
            console.print(f"  before: {escape(repr(found['before']))}\n  after:  {escape(repr(found['after']))}")
    if not found["volatile"] and "cause" not in found:
        console.print("Nothing that changes from request to request was found.")


def _read(path: Path) -> Conversation:
    try:
        body = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RequestError("file_not_found", f"There is no file {str(path)!r}.") from None
    except (OSError, ValueError) as error:
        raise RequestError("invalid_json", f"{path} cannot be read as JSON: {error}.") from None
    if isinstance(body, list):
        body = {"messages": body}
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise RequestError("missing_parameter", f"{path} holds no messages.", "messages")
    return Conversation(messages, body.get("tools") or (), body.get("chat_template_kwargs") or {})


COMMAND = Command(run)
