"""``loraplex chat``: ask an adapter, with the base or another version beside it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.client import AdminClient, RemoteError
from server.cli.command import LOCAL, Json, Key, Url, connected

if TYPE_CHECKING:
    from rich.console import RenderableType

_CHAT = "/v1/chat/completions"


@dataclass
class Side:
    """One model's part of a conversation, and its newest answer. Times are in seconds."""

    model: str
    turns: list[dict[str, str]] = field(default_factory=list)
    text: str = ""
    first: float | None = None
    seconds: float = 0.0
    tokens: int | None = None
    error: RemoteError | None = None

    def ask(self, server: AdminClient, prompt: str, options: dict[str, Any]) -> None:
        """Puts the answer into ``text`` as it comes; an error into ``error``."""
        self.text, self.first, self.tokens, self.error = "", None, None, None
        self.turns.append({"role": "user", "content": prompt})
        body = {"model": self.model, "messages": self.turns, "stream": True, **options}
        began = time.monotonic()
        try:
            with server.events(_CHAT, body | {"stream_options": {"include_usage": True}}) as chunks:
                for piece in self._pieces(chunks):
                    if self.first is None:
                        self.first = time.monotonic() - began
                    self.text += piece
        except RemoteError as exc:
            self.error = exc
        self.seconds = time.monotonic() - began
        self.turns.append({"role": "assistant", "content": self.text})

    def _pieces(self, chunks: Iterator[dict[str, Any]]) -> Iterator[str]:
        """The answer's text; an empty piece for a thought, which is a first token too."""
        for chunk in chunks:
            if usage := chunk.get("usage"):
                self.tokens = usage["completion_tokens"]
            for choice in chunk["choices"]:
                delta = choice["delta"]
                if (piece := delta.get("content")) or delta.get("reasoning"):
                    yield piece or ""

    def as_json(self) -> dict[str, Any]:
        error = {"code": self.error.code, "message": str(self.error)} if self.error else None
        return {
            "model": self.model,
            "text": self.text,
            "output_tokens": self.tokens,
            "first_token_seconds": self.first and round(self.first, 4),
            "seconds": round(self.seconds, 4),
            "error": error,
        }


def chat(
    model: Annotated[str, typer.Argument(help="An adapter, or a version of one: support@3.")],
    prompt: Annotated[str | None, typer.Argument(help="Asked once; a conversation if not given.")] = None,
    beside: Annotated[
        str | None, typer.Option(help="Another model that is asked the same; the base if not given.")
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Nothing beside it.")] = False,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest tokens.")] = 0.0,
    url: Url = LOCAL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Ask an adapter, beside the base model or another version; needs a customer's key."""
    with connected(url, key) as server:
        if (me := server.me()) is None:
            raise RemoteError("customers_only", "Chat needs a customer's key: admin keys cannot ask.")
        other = beside or (me["base"]["name"] if me["base"]["allowed"] else None)
        names = [model] if alone or other is None or other == model else [model, other]
        first = [{"role": "system", "content": system}] if system else []
        sides = [Side(name, list(first)) for name in names]
        options = {"temperature": temperature} | ({"max_tokens": max_tokens} if max_tokens else {})
        for question in [prompt] if prompt is not None else _questions():
            _ask_all(server, sides, question, options, quiet=as_json)
            if as_json:
                print(json.dumps({"prompt": question, "answers": [side.as_json() for side in sides]}))
        if prompt is not None and (failed := next((s.error for s in sides if s.error), None)):
            raise failed


def _questions() -> Iterator[str]:
    """From a person until Ctrl-D, or the lines of a file."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            question = typer.prompt("", prompt_suffix="> ", err=True)
        except typer.Abort:  # Ctrl-D, Ctrl-C, the end of a file
            return
        yield question


def _ask_all(
    server: AdminClient, sides: list[Side], prompt: str, options: dict[str, Any], *, quiet: bool
) -> None:
    """All at once, and shown while they answer unless ``quiet``."""
    with ThreadPoolExecutor(len(sides)) as threads:
        asked = [threads.submit(side.ask, server, prompt, options) for side in sides]
        if quiet:
            return
        _watch(lambda: all(one.done() for one in asked), sides)


def _watch(done: Callable[[], bool], sides: list[Side]) -> None:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), refresh_per_second=8, get_renderable=lambda: _columns(sides)):
        while not done():
            time.sleep(0.05)


def _columns(sides: list[Side]) -> RenderableType:
    """The answers side by side."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(expand=True, pad_edge=False)
    for side in sides:
        table.add_column(escape(side.model), ratio=1, overflow="fold")
    table.add_row(*(escape(side.text) + _failure(side) for side in sides))
    table.add_row(*(f"[dim]{_times(side)}[/dim]" for side in sides))
    return table


def _failure(side: Side) -> str:
    from rich.markup import escape

    return f"[red]{escape(side.error.code)}[/red]: {escape(str(side.error))}" if side.error else ""


def _times(side: Side) -> str:
    if side.first is None or not side.seconds:
        return ""
    tokens = f"{side.tokens} tokens, " if side.tokens is not None else ""
    return f"{tokens}first after {side.first:.2f} s, {side.seconds:.2f} s in all"
