"""Make, list, rotate and revoke API keys.

The server takes keys when it is started with --auth and finds them where this command puts them.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Annotated

import rich
import typer
from rich.markup import escape
from rich.table import Table

from tokenmill.cli.command import Command
from tokenmill.cli.terminal import notes
from tokenmill.errors import ConfigError, MissingDependencyError, did_you_mean
from tokenmill.server.config import StoreConfig
from tokenmill.types import JSON

__all__ = ["COMMAND"]

_ACTIONS = ("create", "list", "rotate", "revoke")


def run(
    store: StoreConfig,
    action: Annotated[str, typer.Argument(help="create, list, rotate or revoke.")],
    which: Annotated[str, typer.Argument(metavar="[NAME or ID]", help="Name of the new key, or id of one.")] = "",
    scopes: Annotated[str, typer.Option(metavar="A,B", help="create: inference, admin, metrics.")] = "inference",
    models: Annotated[str, typer.Option(metavar="A,B", help="create: served names it may use; empty is all.")] = "",
    priority: Annotated[int, typer.Option(metavar="N", help="create: added to that of its requests.")] = 0,
    requests_per_minute: Annotated[int | None, typer.Option(metavar="N", help="create: limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(metavar="N", help="create: limit.")] = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="create: limit.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(metavar="N", help="create: limit.")] = None,
    dollars_per_day: Annotated[float | None, typer.Option(metavar="X", help="create: limit.")] = None,
    expires_days: Annotated[float | None, typer.Option(metavar="X", min=0, help="create: good for so long.")] = None,
    owner: Annotated[str, typer.Option(metavar="TEXT", help="create: whose it is.")] = "",
    note: Annotated[str, typer.Option(metavar="TEXT", help="create: what it is for.")] = "",
    grace_s: Annotated[float, typer.Option(metavar="X", min=0, help="rotate: the old one stays good.")] = 86_400.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Make, list, rotate and revoke API keys. A key is shown once, when it is made."""
    if action not in _ACTIONS:
        raise ConfigError("unknown_choice", f"Keys cannot be {action!r}. {did_you_mean(action, _ACTIONS)}", "action")
    if action != "list" and not which:
        what = "a name" if action == "create" else "the id of a key"
        raise ConfigError("missing_argument", f"`tokenmill keys {action}` needs {what}.", "which")
    try:
        from tokenmill.server.tenancy.keys import Keys, KeySpec, limits_of
        from tokenmill.server.tenancy.store import Store
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tokenmill"):
            raise
        raise MissingDependencyError(error.name, "The store of keys", "serve") from error
    with contextlib.closing(Store(store)) as opened:
        opened.migrate()
        keys, now = Keys(opened), time.time()
        secret: str | None = None
        if action == "list":
            found = keys.all()
        elif action == "revoke":
            found = [keys.revoke(which)]
        elif action == "rotate":
            key, secret = keys.rotate(which, grace_s)
            found = [key]
        else:
            limits = {
                "requests_per_minute": requests_per_minute,
                "tokens_per_minute": tokens_per_minute,
                "concurrency": concurrency,
                "tokens_per_day": tokens_per_day,
                "dollars_per_day": dollars_per_day,
            }
            spec = KeySpec(
                name=which,
                scopes=_words(scopes),
                models=_words(models) or None,
                priority=priority,
                limits=limits_of(limits),
                owner=owner,
                note=note,
                expires=None if expires_days is None else now + expires_days * 86_400,
            )
            key, secret = keys.create(spec)
            found = [key]
        shown = [key.to_json(now) for key in found]
    if as_json:
        print(json.dumps(shown if action == "list" else shown[0] | ({"key": secret} if secret else {})))
    elif secret is not None:
        print(secret)
        notes.print(f"This is the only time that the key {shown[0]['id']} is shown.")
    else:
        rich.print(_table(shown))
    return 0


def _words(text: str) -> frozenset[str]:
    return frozenset(word.strip() for word in text.split(",") if word.strip())


def _table(shown: list[JSON]) -> Table:
    table = Table(box=None)
    for name in ("id", "name", "owner", "status", "scopes", "models", "limits"):
        table.add_column(name)
    for key in shown:
        limits = ", ".join(f"{name} {value:g}" for name, value in key["limits"].items() if value is not None)
        models = "all" if key["models"] is None else ", ".join(key["models"])
        cells = (key["id"], key["name"], key["owner"], key["status"], ", ".join(key["scopes"]), models, limits)
        table.add_row(*map(escape, cells))
    return table


COMMAND = Command(run, common=("state", "database"))
