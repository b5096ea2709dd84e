"""Whether a grammar (a JSON schema, a pattern …) may be given to the engine: tried out before, elsewhere.

    Grammars.check(owner, specs)   returns once all of ``specs`` are known to be usable, or raises BadRequest

vLLM parses a grammar on the event loop and compiles it in the engine's process, without a limit: three
patterns of a line each keep both busy for minutes. So each is compiled first in a process of its own
(``server.engine.grammar_process``), under limits of time and memory, and what passes is remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from adapters.awake import AwakeTimeout
from server.engine.grammar_process import LENGTH
from server.errors import BadRequest, TooManyRequests, Unavailable

logger = logging.getLogger(__name__)

PROGRAM = Path(__file__).with_name("grammar_process.py")
MEMORY_BYTES = 512 << 20  # that compiling may take, beyond what the process has anyway
LARGEST_BYTES = 64 << 20  # that the engine keeps of one
REMEMBERED = 4096
REFUSED_FOR_S = 60.0  # what was refused may have been refused because much else ran
MOST_WAITING = 32  # for each owner
START_TIMEOUT_S = 60.0  # it imports torch
BY_THE_CLOCK = 10  # times its processor time a check may take on a machine that is busy


class Spec(NamedTuple):
    """``kind`` is json, regex, grammar, lark or structural_tag."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why it was refused, if it was; ``too_much`` is for what costs too much, not for what is wrong."""

    error: str | None
    too_much: bool = False
    until: float = float("inf")


class Grammars:
    """One owner cannot keep the others waiting: it compiles in at most half of the places.

    ``seconds`` of processor time are the most that one check may take, and ``BY_THE_CLOCK`` times as many
    pass before its asker is told to come again, not counting the wait for a place.
    """

    def __init__(self, tokenizer: str, *, seconds: float, any_whitespace: bool, places: int = 0) -> None:
        self._tokenizer = tokenizer
        self._seconds = seconds
        self._any_whitespace = any_whitespace
        places = places or max(4, min(8, (os.cpu_count() or 1) // 2))
        self._each = max(1, places // 2)
        self._places = asyncio.Semaphore(places)
        self._owners: dict[str, asyncio.Semaphore] = {}
        self._waiting: Counter[str] = Counter()
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()
        self._under_way: dict[bytes, asyncio.Task[Verdict]] = {}
        self._askers: Counter[bytes] = Counter()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def check(self, owner: str, specs: Sequence[Spec], param: str | None = None) -> None:
        """Returns if the engine may be given ``specs``. Cancelled, it ends what is compiled for it alone.

        Raises BadRequest (``schema_too_complex`` where it costs too much time or memory), TooManyRequests for
        an owner with too many under way, Unavailable if nothing can be compiled.
        """
        if not specs:
            return
        key = _key(owner, specs)
        verdict = self._remembered(key)
        if verdict is None:
            verdict = await self._joined(key, owner, specs)
        if verdict.error is not None:
            raise BadRequest(
                f"The schema, pattern or grammar cannot be used: {verdict.error}",
                code="schema_too_complex" if verdict.too_much else None,
                param=param,
            )

    def _remembered(self, key: bytes) -> Verdict | None:
        verdict = self._known.get(key)
        if verdict is not None and verdict.until < time.monotonic():
            del self._known[key]
            return None
        if verdict is not None:
            self._known.move_to_end(key)
        return verdict

    async def _joined(self, key: bytes, owner: str, specs: Sequence[Spec]) -> Verdict:
        """The verdict of a check that is under way, or of one that is begun; it ends with its last asker."""
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(self._judged(key, owner, specs))
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        self._askers[key] += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._askers[key] -= 1
            if not self._askers[key]:
                del self._askers[key]
                if not task.done():
                    self._under_way.pop(key, None)
                    task.cancel()

    async def _judged(self, key: bytes, owner: str, specs: Sequence[Spec]) -> Verdict:
        async with self._place(owner):
            verdict = await self._compiled(specs)
        self._known[key] = verdict
        if verdict.error is None:
            self._known |= {_key(owner, [spec]): verdict for spec in specs}
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return verdict

    @asynccontextmanager
    async def _place(self, owner: str) -> AsyncIterator[None]:
        """One of the places, within ``seconds``: whoever asks is not left without an answer."""
        if self._waiting[owner] >= MOST_WAITING:
            raise self._too_many()
        self._waiting[owner] += 1
        own = self._owners.setdefault(owner, asyncio.Semaphore(self._each))
        try:
            async with AsyncExitStack() as held:
                try:
                    async with AwakeTimeout(self._seconds):
                        await held.enter_async_context(own)
                        await held.enter_async_context(self._places)
                except TimeoutError:
                    raise self._too_many() from None
                yield
        finally:
            self._waiting[owner] -= 1
            if not self._waiting[owner]:
                del self._waiting[owner], self._owners[owner]

    def _too_many(self) -> TooManyRequests:
        return TooManyRequests(
            "Too many new schemas at once; send one again when the others are answered.",
            retry_after=self._seconds,
        )

    async def _compiled(self, specs: Sequence[Spec]) -> Verdict:
        """What a child of the compiling process says."""
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                self._hand_over(theirs)
                job = {
                    "specs": specs,
                    "seconds": self._seconds,
                    "memory": MEMORY_BYTES,
                    "largest": LARGEST_BYTES,
                    "any_whitespace": self._any_whitespace,
                }
                message = json.dumps(job).encode()
                writer.write(LENGTH.pack(len(message)) + message)
                theirs.close()
                async with AwakeTimeout(START_TIMEOUT_S):
                    begun = await reader.read(1)
                if not begun:
                    raise Unavailable("Schemas cannot be compiled now.", retry_after=1)
                return await self._answer(reader)
            except (OSError, TimeoutError) as exc:
                logger.warning("the process that compiles grammars does not answer: %r", exc)
                self.stop()
                raise Unavailable("Schemas cannot be compiled now.", retry_after=1) from exc
            finally:
                writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> Verdict:
        began = time.monotonic()
        until = began + REFUSED_FOR_S
        late = f"it takes longer than {self._seconds:g} s to compile; make it simpler"
        try:
            async with AwakeTimeout(BY_THE_CLOCK * self._seconds):  # the kernel ends the child before
                answer = await reader.read()
        except TimeoutError:  # the machine had no time for it, which says nothing of the schema
            raise Unavailable(
                "There is no processor time to compile schemas now.", retry_after=self._seconds
            ) from None
        if not answer:
            in_time = time.monotonic() - began < 0.9 * self._seconds
            why = "the compiler fails on it" if in_time else late
            return Verdict(why, too_much=True, until=until)
        said = json.loads(answer)
        too_much = bool(said.get("too_much"))
        return Verdict(said["error"], too_much, until if too_much else float("inf"))

    def _hand_over(self, job: socket.socket) -> None:
        """Gives the compiling process one end of a job; starts it again if it has ended. Raises OSError."""
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self.start()
        assert self._control is not None
        socket.send_fds(self._control, [b"j"], [job.fileno()])

    async def warm(self) -> None:
        """Returns when the compiling process is ready, which takes it some seconds. Raises Unavailable."""
        await self._compiled([Spec("regex", "a")])

    def start(self) -> None:
        """Starts the compiling process; jobs wait until it is ready."""
        self._control, theirs = socket.socketpair()
        # xgrammar alone needs no thread, and a process with threads should not fork.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs, tempfile.TemporaryFile() as tokenizer:
            tokenizer.write(self._tokenizer.encode())
            tokenizer.seek(0)
            self._process = subprocess.Popen(  # noqa: S603  (our own file)
                [sys.executable, "-P", str(PROGRAM), str(theirs.fileno())],
                stdin=tokenizer,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | single,
                start_new_session=True,
            )

    def stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _key(owner: str, specs: Sequence[Spec]) -> bytes:
    return hashlib.sha256(json.dumps([owner, *specs]).encode()).digest()
