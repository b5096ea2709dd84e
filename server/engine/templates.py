"""Rooms for customers' chat templates: processes that render them, each ended when one takes too long.

    await templates.render(tenant, template, conversation, tools, variables)    the prompt's text
    await templates.check(tenant, template)                                     whether it can be used at all

The processes know nothing of this one: no keys, no database, no adapters (``adapters.inspection.
template_worker``). They are started when the first template needs one, and kept.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from adapters.awake import AwakeTimeout
from server.errors import BadRequest

# At most so many templates run at once, and of one tenant one less: its runaways leave a room to all others.
ROOMS = 2
SECONDS = 30.0  # by the clock; the process ends itself at two of processor time
START_SECONDS = 60.0
_LINE = 1 << 20  # of an answer without its text
_ROOT = Path(__file__).resolve().parents[2]
_QUIETLY = {"PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


class TemplateFailed(Exception):
    """The template did not render; the message says why."""


class Templates:
    """Of one event loop. Tenants take turns: who has had none lately goes before who has just had one."""

    def __init__(self, rooms: Sequence[Room] | None = None) -> None:
        self._rooms = list(rooms) if rooms is not None else [Room() for _ in range(ROOMS)]
        self._free = list(self._rooms)
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[Room]]] = OrderedDict()

    async def close(self) -> None:
        """Ends the processes. What is asked after that starts them again."""
        for room in self._rooms:
            await room.close()

    async def render(
        self,
        tenant: str,
        template: str,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt, by a template of the tenant's.

        Raises BadRequest where the template refuses the conversation, or takes too long.
        """
        named = ("documents", "continue_final_message", "add_generation_prompt")
        asked = {name: variables[name] for name in named if name in variables}
        rest = {name: value for name, value in variables.items() if name not in named}
        body = {"template": template, "conversation": conversation, "tools": tools, "variables": rest}
        try:
            return str((await self._ask(tenant, body | asked))["text"])
        except TemplateFailed as exc:
            raise BadRequest(
                f"The adapter's own chat template does not take these messages: {exc}.", param="messages"
            ) from exc

    async def check(self, tenant: str, template: str) -> str:
        """How it takes a message's content, ``string`` or ``openai``; TemplateFailed where it cannot run."""
        return str((await self._ask(tenant, {"template": template, "trial": True}))["format"])

    async def _ask(self, tenant: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            line = json.dumps(body).encode() + b"\n"
        except (TypeError, ValueError) as exc:
            raise TemplateFailed("they hold something that is no JSON") from exc
        async with self._turn(tenant) as room:
            answer = await room.ask(line)
        if "error" in answer:
            raise TemplateFailed(str(answer["error"]).rstrip("."))
        return answer

    @asynccontextmanager
    async def _turn(self, tenant: str) -> AsyncIterator[Room]:
        """A room, when it is the tenant's turn."""
        turn: asyncio.Future[Room] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._give()
        try:
            yield await turn
        finally:
            if turn.done() and not turn.cancelled():
                self._take_back(tenant, turn.result())
            elif not turn.done():  # somebody closed this before its turn came
                turn.cancel()

    def _give(self) -> None:
        """Gives free rooms to those whose turn it is."""
        most = max(1, len(self._rooms) - 1)
        while self._free:
            tenant = next((one for one in self._waiting if self._running[one] < most), None)
            if tenant is None:
                return
            turns = self._waiting[tenant]
            turn = turns.popleft()
            if not turns:
                del self._waiting[tenant]
            if turn.done():  # its caller has left
                continue
            self._running[tenant] += 1
            self._free.sort(key=lambda room: room.is_up)  # one whose process runs, where there is one
            turn.set_result(self._free.pop())
            if turns:
                self._waiting.move_to_end(tenant)

    def _take_back(self, tenant: str, room: Room) -> None:
        self._free.append(room)
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        if tenant in self._waiting:
            self._waiting.move_to_end(tenant)
        self._give()


class Room:
    """One process, or none: it is started when it is asked, and again after it was ended."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_up(self) -> bool:
        """Whether its process runs already; to start one takes seconds."""
        return self._process is not None and self._process.returncode is None

    async def ask(self, line: bytes) -> dict[str, Any]:
        """What the process answers to ``line``. TemplateFailed where it was ended, or does not start."""
        if not self.is_up:
            self._process = await _started()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with AwakeTimeout(SECONDS):
                process.stdin.write(line)
                await process.stdin.drain()
                answer = await process.stdout.readline()
                found: dict[str, Any] = json.loads(answer) if answer else {}
                text = await process.stdout.readexactly(found.get("bytes", 0))
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            answer = b""
        except BaseException:  # its answer would be the next one's
            self._end()
            raise
        if not answer:
            self._end()
            raise TemplateFailed("it takes too long, or too much memory")
        return found | {"text": text.decode()}

    async def close(self) -> None:
        """Ends the process, if there is one."""
        process = self._process
        self._end()
        if process is not None:
            await process.wait()

    def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None


async def _started() -> asyncio.subprocess.Process:
    """A process that has said that it is ready. TemplateFailed where it does not come up."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "adapters.inspection.template_worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=_ROOT,
        env=environment
        | {"PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        limit=_LINE,
    )
    assert process.stdout is not None
    try:
        async with AwakeTimeout(START_SECONDS):
            ready = await process.stdout.readline()
    except BaseException:
        process.kill()
        raise
    if not ready:
        raise TemplateFailed("the process that renders it did not start")
    return process


async def close_templates() -> None:
    """Ends the rooms of the running event loop, if it has any."""
    rooms = _of_loop.pop(asyncio.get_running_loop(), None)
    if rooms is not None:
        await rooms.close()


_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Templates] = WeakKeyDictionary()


def templates() -> Templates:
    """The rooms of the running event loop."""
    return _of_loop.setdefault(asyncio.get_running_loop(), Templates())
