"""What every command that talks to a running server has in common.

A command is a function from a client and its arguments to (document, what to show): people see the
second, ``--json`` prints the first. It ends with 1 and ``code: message`` when the server refuses.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from server.cli.arguments import Name, SomeName, SomeTenant, Tenant
from server.cli.client import OWN, AdminClient, RemoteError
from server.cli.tables import Shown

Url = Annotated[str, typer.Option("--url", envvar="LORAPLEX_URL", help="Where the server is.")]
KEY_VARIABLES = ["LORAPLEX_KEY", "LORAPLEX_ADMIN_KEY"]
Key = Annotated[
    str,
    typer.Option(
        "--key", envvar=KEY_VARIABLES, help="An admin key, or a customer's own.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Command = Callable[..., Shown]
LOCAL = "http://127.0.0.1:8000"
PIPED_WIDTH = 200  # columns of a table that goes to a file or a pipe

_COMMON = {"url": (Url, LOCAL), "key": (Key, ""), "as_json": (Json, False)}


def command(
    group: typer.Typer, name: str | None = None, *, fields: Callable[..., dict[str, Any]] | None = None
) -> Callable[[Command], Command]:
    """Adds a function to ``group``, with the options that say which server and how to print.

    ``fields`` has options of its own, and what it returns goes to the function's argument of that name.
    """

    def register(run: Command) -> Command:
        own = _parameters(run)
        more = _parameters(fields) if fields else []
        names = [parameter.name for parameter in more]

        @functools.wraps(run)
        def wrapped(*, url: str, key: str, as_json: bool, **given: Any) -> None:
            if fields is not None:
                given["fields"] = fields(**{name: given.pop(name) for name in names})
            with connected(url, key) as server:
                document, shown = run(server, **given)
            if as_json:
                print(json.dumps(document, indent=2))
            else:
                show(shown)

        added = [_keyword(n, annotation=a, default=d) for n, (a, d) in _COMMON.items()]
        wrapped.__signature__ = inspect.Signature([*own, *more, *added])  # type: ignore[attr-defined]
        leading = [p.name for p in own if p.annotation in (Tenant, Name, SomeTenant, SomeName)]
        group.command(name, cls=_named_first(leading))(wrapped)
        return run

    return register


def show(table: Any) -> None:
    """Prints it, in wide rows where it goes to a file or a pipe, which has no width of its own."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=PIPED_WIDTH)
    console.print(table)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """What the command line gives to ``function``."""
    signature = inspect.signature(function, eval_str=True)
    own = (p for p in signature.parameters.values() if p.name not in ("server", "fields"))
    return [p.replace(kind=p.KEYWORD_ONLY) for p in own]


def _keyword(name: str, **of: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, **of)


def _named_first(names: list[str]) -> type[TyperCommand]:
    """Commands whose first arguments are ``names``, where ``--tenant acme`` says the same as ``acme``.

    A customer that is not named is the one whose key is used.
    """

    class NamedFirst(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            found: dict[str, str] = {}
            rest = iter(args)
            others = []
            for word in rest:
                option, is_joined, value = word.partition("=")
                if option.startswith("--") and option[2:] in names:
                    found[option[2:]] = value if is_joined else next(rest, "")
                else:
                    others.append(word)
            if (
                names[:1] == ["tenant"]
                and "tenant" not in found
                and self._lacks(ctx, others) == len(found) + 1
            ):
                found["tenant"] = OWN
            for place, name in enumerate(names):
                if name in found and not any(word.startswith("-") for word in others[:place]):
                    others.insert(place, found[name])
            return super().parse_args(ctx, others)

        def _lacks(self, ctx: Any, args: list[str]) -> int:
            """How many arguments that must be there are not."""
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            needed = [p.name for p in self.params if p.param_type_name == "argument" and p.required]
            return sum(given.get(name) is None for name in needed)

    return NamedFirst


def say(style: str, word: str, text: str) -> None:
    """One line on standard error: ``word`` in a colour, then ``text`` as it is."""
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print(f"[{style}]{escape(word)}[/{style}] {escape(text)}", soft_wrap=True)


@contextmanager
def connected(url: str, key: str) -> Iterator[AdminClient]:
    """A client; whatever it refuses is printed, and ends the program with 1."""
    try:
        if not key:
            raise RemoteError("no_key", "Give a key with LORAPLEX_KEY, LORAPLEX_ADMIN_KEY or --key.")
        server = AdminClient(url, key)
        try:
            yield server
        finally:
            server.close()
    except RemoteError as exc:
        from rich.console import Console
        from rich.markup import escape

        text = f"[red]{escape(exc.code)}[/red]: {escape(str(exc))}"
        Console(stderr=True).print(text, soft_wrap=True)
        raise SystemExit(1) from exc
