"""Simulations in a process of their own."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

from tests.bench.scenario import Round, Values


async def in_a_process(simulate: Callable[[Round], Values], round_: Round) -> Values:
    """With a heap of its own, so that its times are its own, and ended when this is cancelled.

    No pool: a pool's processes are daemons, which may not start the servers that some measure.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_answer, args=(theirs, simulate, round_))
    process.start()
    theirs.close()
    try:
        while not ours.poll():
            await asyncio.sleep(0.1)
        found = ours.recv()  # EOFError where it ended without a word
    finally:
        process.kill()
        process.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    values: Values = found
    return values


def _answer(to: Connection, simulate: Callable[[Round], Values], round_: Round) -> None:
    """Sends what was measured, or what went wrong, in words."""
    try:
        to.send(simulate(round_))
    except Exception as exc:
        to.send(f"{type(exc).__name__}: {exc}")
