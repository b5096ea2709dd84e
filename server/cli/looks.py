"""Looks at something that changes: on a terminal in place of the one before, elsewhere below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # see server.cli.tables
    from rich.console import Console, RenderableType


@contextmanager
def looks(console: Console, *, transient: bool = False) -> Iterator[Callable[[RenderableType], None]]:
    """Yields what shows a look, at once. ``transient``: the last one leaves the terminal at the end."""
    from rich.live import Live

    def printed(seen: RenderableType) -> None:
        console.print(seen)
        console.file.flush()

    if not console.is_terminal:
        yield printed
        return
    with Live(console=console, auto_refresh=False, transient=transient) as live:
        yield lambda seen: live.update(seen, refresh=True)
