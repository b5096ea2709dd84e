"""What customers do that is no fault, or theirs: each has to end as documented, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import time

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.bench.chaos.world import OWN, PATIENCE, SPARE, Missed, World
from tests.support import tiny
from tests.support.site import ADMIN_KEY, bearer


async def vanish(world: World) -> str:
    """Forty clients leave in the middle of a stream, and forty in the middle of a wait."""
    await world.spare("left")

    async def leave(stream: bool) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(world.rng.uniform(0.05, 0.5)):
                await world.ask("left", max_tokens=100, stream=stream, ignore_eos=True)

    await asyncio.gather(*(leave(bool(i % 2)) for i in range(80)), return_exceptions=True)
    await world.until("left", 200)
    return ""


async def quarantine(world: World) -> str:
    """An answer of an adapter is not a number: it is out of service, and back by order."""
    await world.spare("bad")
    await world.until("bad", 200)
    deadline = time.monotonic() + PATIENCE
    while (await world.ask("bad"))[1] != "adapter_quarantined":
        if time.monotonic() > deadline:
            raise Missed("an adapter that makes NaN is not quarantined")
        world.service.order(do="not_finite", model=f"{SPARE}/bad@")  # nothing where it has left memory
        await asyncio.sleep(0.5)
    path = f"/tenants/{SPARE}/adapters/bad"
    (await world.service.admin("PATCH", path, json={"quarantined": False})).raise_for_status()
    await world.until("bad", 200)
    return ""


async def cut_uploads(world: World) -> str:
    """Half of an upload, and then nobody."""
    files = {file: (tiny.adapter(OWN) / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
    request = world.service.http.build_request(
        "POST", f"/admin/v1/tenants/{SPARE}/adapters/half/versions", files=files, headers=bearer(ADMIN_KEY)
    )
    await world.spare("whole")
    body = request.read()
    head = f"POST {request.url.path} HTTP/1.1\r\n" + "".join(
        f"{k}: {v}\r\n" for k, v in request.headers.items()
    )
    for _ in range(5):
        _, writer = await asyncio.open_connection("127.0.0.1", world.service.port)
        writer.write(head.encode() + b"\r\n" + body[: world.rng.randrange(len(body))])
        await writer.drain()
        await asyncio.sleep(world.rng.uniform(0, 0.2))
        writer.transport.abort()
    await world.until("half", 404, "model_not_found")
    return ""


async def delete_in_use(world: World) -> str:
    """A stream of a deleted adapter ends whole; then there is none."""
    digest = await world.spare("gone")
    running = asyncio.create_task(world.ask("gone", max_tokens=100, ignore_eos=True))
    await asyncio.sleep(0.4)
    (await world.service.admin("DELETE", f"/tenants/{SPARE}/adapters/gone")).raise_for_status()
    status, text, _ = await running
    if (status, text) != (200, digest + "".join(f" {i}" for i in range(1, 100))):
        raise Missed(f"who was being answered got {status} {text[:200]}")
    await world.until("gone", 404, "model_not_found")
    return ""


async def back_and_forth(world: World) -> str:
    """Another live version forty times, while it is asked: each answer is of the version that it names."""
    name = f"flip-{world.number}"  # numbers of versions go on after an adapter was deleted
    digests = {f"{name}@1": await world.spare(name), f"{name}@2": await world.upload(name)}
    wrong: list[str] = []

    async def ask() -> None:
        for _ in range(40):
            status, text, version = await world.ask(name)
            if status != 200 or not text.startswith(digests[version]):
                wrong.append(f"{version} answered {status} {text[:100]}")

    asking = asyncio.gather(*(ask() for _ in range(3)))
    for number in range(40):
        path = f"/tenants/{SPARE}/adapters/{name}"
        (await world.service.admin("PATCH", path, json={"live": 1 + number % 2})).raise_for_status()
    await asking
    if wrong:
        raise Missed(f"{len(wrong)} × {wrong[0]}")
    return ""
