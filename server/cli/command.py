"""What every command that talks to a running server has in common.

A command is a function from a ``Remote`` and its arguments to (document, what to show): people see the
second, ``--json`` prints the first. It ends with 1 and ``code: message`` when the server refuses.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from server.cli.client import Remote, RemoteError
from server.cli.tables import Shown

err = Console(stderr=True)
Url = Annotated[str, typer.Option("--url", envvar="LORAPLEX_URL", help="Where the server is.")]
Key = Annotated[
    str, typer.Option("--key", envvar="LORAPLEX_ADMIN_KEY", help="The admin key.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Command = Callable[..., Shown]
LOCAL = "http://127.0.0.1:8000"

_COMMON = {"url": (Url, LOCAL), "key": (Key, ""), "as_json": (Json, False)}


def command(group: typer.Typer, name: str | None = None) -> Callable[[Command], Command]:
    """Adds ``run`` to ``group``, with the options that say which server and how to print."""

    def register(run: Command) -> Command:
        @functools.wraps(run)
        def wrapped(*, url: str, key: str, as_json: bool, **given: Any) -> None:
            with connected(url, key) as server:
                document, shown = run(server, **given)
            if as_json:
                print(json.dumps(document, indent=2))
            else:
                Console().print(shown)

        signature = inspect.signature(run, eval_str=True)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "server"]
        added = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=a, default=d)
            for n, (a, d) in _COMMON.items()
        ]
        wrapped.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        group.command(name)(wrapped)
        return run

    return register


@contextmanager
def connected(url: str, key: str) -> Iterator[Remote]:
    """A Remote; whatever it refuses is printed, and ends the program with 1."""
    try:
        if not key:
            raise RemoteError("no_key", "Give the admin key with LORAPLEX_ADMIN_KEY or --key.")
        server = Remote(url, key)
        try:
            yield server
        finally:
            server.close()
    except RemoteError as exc:
        err.print(f"[red]{escape(exc.code)}[/red]: {escape(str(exc))}", soft_wrap=True)
        raise SystemExit(1) from exc
