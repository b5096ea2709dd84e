"""Rooms for customers' chat templates: processes that render them, each ended when one takes too long.

    await templates.render(template, conversation, tools, variables)    the prompt's text
    await templates.check(template)                                     whether it can be used at all

The processes know nothing of this one: no keys, no database, no adapters (``adapters.inspection.
template_worker``). They are started when the first template needs one, and kept.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from adapters.awake import AwakeTimeout
from server.errors import BadRequest

# At most so many templates run at once; one that runs away leaves the other room to everybody else.
ROOMS = 2
SECONDS = 30.0  # by the clock; the process ends itself at two of processor time
START_SECONDS = 60.0
_LINE = 1 << 20  # of an answer without its text
_ROOT = Path(__file__).resolve().parents[2]
_QUIETLY = {"PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


class TemplateFailed(Exception):
    """The template did not render; the message says why."""


class Templates:
    """Of one event loop. ``render`` takes the next free room."""

    def __init__(self) -> None:
        self._rooms = [_Room() for _ in range(ROOMS)]
        self._free: asyncio.Queue[_Room] = asyncio.Queue()
        for room in self._rooms:
            self._free.put_nowait(room)

    async def close(self) -> None:
        """Ends the processes. What is asked after that starts them again."""
        for room in self._rooms:
            await room.close()

    async def render(
        self,
        template: str,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt. Raises BadRequest where the template refuses the conversation, or takes too long."""
        named = ("documents", "continue_final_message", "add_generation_prompt")
        asked = {name: variables[name] for name in named if name in variables}
        rest = {name: value for name, value in variables.items() if name not in named}
        body = {"template": template, "conversation": conversation, "tools": tools, "variables": rest}
        try:
            return str((await self._ask(body | asked))["text"])
        except TemplateFailed as exc:
            raise BadRequest(
                f"The adapter's own chat template does not take these messages: {exc}.", param="messages"
            ) from exc

    async def check(self, template: str) -> str:
        """How it takes a message's content, ``string`` or ``openai``; TemplateFailed where it cannot run."""
        return str((await self._ask({"template": template, "trial": True}))["format"])

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            line = json.dumps(body).encode() + b"\n"
        except (TypeError, ValueError) as exc:
            raise TemplateFailed("they hold something that is no JSON") from exc
        room = await self._free.get()
        try:
            answer = await room.ask(line)
        finally:
            self._free.put_nowait(room)
        if "error" in answer:
            raise TemplateFailed(str(answer["error"]).rstrip("."))
        return answer


class _Room:
    """One process, or none: it is started when it is asked, and again after it was ended."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, line: bytes) -> dict[str, Any]:
        if self._process is None or self._process.returncode is not None:
            self._process = await _started()
        process = self._process
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
