"""Whose chat template is rendered next, in rooms that need no process."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from server.engine.templates import ROOMS, Room, Templates

CONVERSATION = [{"role": "user", "content": "Hi"}]


class Slow(Room):
    """A room in which each template runs until the test lets it end; ``began`` has all, by whose they are."""

    began: list[str]

    def __init__(self, began: list[str]) -> None:
        super().__init__()
        self.began = began
        self.running: asyncio.Future[None] | None = None

    async def ask(self, line: bytes) -> dict[str, Any]:
        self.began.append(json.loads(line)["template"])
        self.running = asyncio.get_running_loop().create_future()
        try:
            await self.running
        finally:
            self.running = None
        return {"text": "done"}


class House:
    """Rooms, and everybody who waits for one."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.rooms = [Slow(self.began) for _ in range(ROOMS)]
        self.templates = Templates(self.rooms)
        self.tasks: list[asyncio.Task[str]] = []

    async def come(self, tenant: str, times: int = 1) -> None:
        render = self.templates.render
        self.tasks += [
            asyncio.create_task(render(tenant, tenant, CONVERSATION, None, {})) for _ in range(times)
        ]
        await settled()

    async def end(self, room: int) -> None:
        running = self.rooms[room].running
        assert running is not None
        running.set_result(None)
        await settled()

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_one_tenants_runaways_leave_a_room_to_all_others() -> None:
    house = House()
    await house.come("evil", 20)
    assert house.began == ["evil"] * (ROOMS - 1)
    await house.come("victim")
    assert house.began[-1] == "victim"
    await house.close()


@pytest.mark.parametrize("room", range(ROOMS))
async def test_between_two_attackers_a_victim_waits_for_one_template(room: int) -> None:
    house = House()
    await house.come("evil", 20)
    await house.come("worse", 20)
    await house.come("victim", 2)
    assert house.began == ["evil", "worse"]
    await house.end(room)
    assert house.began[2:] == ["victim"]
    await house.end(1 - room)
    assert house.began[3] != "victim", "it has one room of two"
    await house.end(room)
    assert house.began.count("victim") == 1, "the others are due"
    await house.end(1 - room)
    assert house.began.count("victim") == 2
    await house.close()


async def test_who_leaves_before_its_turn_or_in_it_takes_no_room_along() -> None:
    house = House()
    await house.come("a")
    await house.come("b", 3)
    house.tasks[2].cancel()  # waits
    house.tasks[1].cancel()  # runs
    await settled()
    assert house.began == ["a", "b", "b"]
    house.tasks[0].cancel()
    house.tasks[3].cancel()
    await settled()
    assert len(house.templates._free) == ROOMS
    assert not house.templates._waiting
    assert not house.templates._running


async def test_one_that_leaves_as_its_turn_comes_gives_it_on() -> None:
    house = House()
    await house.come("a", 3)
    running = house.rooms[-1].running or house.rooms[0].running
    assert running is not None
    running.set_result(None)
    await asyncio.sleep(0)  # the first one ends, and the second has a room that it does not know of yet
    house.tasks[1].cancel()
    await settled()
    assert house.began.count("a") == 2
    assert house.tasks[1].cancelled()
    await house.close()
    assert len(house.templates._free) == ROOMS
