"""A fleet on several machines: each process has its own data folder, the files are in an object store."""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from io import BytesIO
from pathlib import Path

import pytest

from adapters.model import WEIGHTS_FILE
from adapters.store import objects
from server.app import create_app
from tests.support import tiny
from tests.support.fleet import FLEET_KEY, Fleet, replica
from tests.support.object_stores import KINDS, s3_server, url_of
from tests.support.site import Site, serving


class Swallower:
    """Passes connections on to ``port``; while ``silent`` it takes all that is sent, and gives nothing."""

    def __init__(self, port: int) -> None:
        self.silent = False
        self.port = 0
        self._to = port
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        yield
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        for one, other in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pass(one, other))
            self._tasks.add(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if not self.silent:
                    writer.write(data)
                    await writer.drain()
        writer.close()


@asynccontextmanager
async def on_one_store(folder: Path, url: str, database: Path) -> AsyncIterator[Fleet]:
    """A gateway and two replicas, each with a data folder of its own."""
    shared = {"database_url": f"sqlite+aiosqlite:///{database}", "blobs_url": url}
    async with AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(replica(folder / f"replica-{number}", **shared))
            for number in range(2)
        ]
        settings = tiny.settings(folder / "gateway", role="gateway", fleet_key=FLEET_KEY, **shared)
        gateway = await stack.enter_async_context(serving(create_app(settings)))
        fleet = Fleet(gateway, made)
        await fleet.all_known()
        yield fleet


def use(patch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        patch.setenv(name, value)


async def asked(gateway: Site, key: str, model: str) -> tuple[int, str | None]:
    answer = await gateway.chat(key, "hello", model=model, max_tokens=2)
    return answer.status_code, answer.json().get("error", {}).get("code")


async def test_a_store_that_swallows_everything_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What replicas have is served, the rest gets a 503, and nothing is lost."""
    monkeypatch.setattr(objects, "_RETRIES", 0)  # of what is made from here on
    with s3_server() as s3:
        store = Swallower(s3.port)
        async with store.running():
            use(monkeypatch, {**s3.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.port}"})
            bucket = await asyncio.to_thread(s3.bucket)
            async with on_one_store(tmp_path / "one", bucket, tmp_path / "shared.db") as fleet:
                key = await fleet.gateway.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
            async with on_one_store(
                tmp_path / "two", bucket, tmp_path / "shared.db"
            ) as fleet:  # whose folders are empty
                gateway = fleet.gateway
                assert await asked(gateway, key, "a") == (200, None)
                store.silent = True
                monkeypatch.setattr(objects, "_CALL", 1.0)
                for _ in range(3):
                    assert await asked(gateway, key, "a") == (200, None)
                assert await asked(gateway, key, "b") == (503, "store_unavailable")
                refused = await gateway.upload("acme", "c", tiny.adapter(3))
                assert refused.status_code == 503, refused.text
                assert await asked(gateway, key, "c") == (404, "model_not_found")
                assert (await gateway.http.get("/ready")).status_code == 200
                store.silent = False
                monkeypatch.setattr(objects, "_CALL", 60.0)
                assert await asked(gateway, key, "b") == (200, None)
                assert (await gateway.upload("acme", "c", tiny.adapter(3))).status_code == 201
                for name in "abc":
                    assert await asked(gateway, key, name) == (200, None)


@pytest.mark.parametrize("kind", KINDS)
async def test_each_process_has_its_own_data_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as s3:
        use(monkeypatch, s3.environment)
        async with on_one_store(tmp_path, url_of(kind, s3, tmp_path), tmp_path / "shared.db") as fleet:
            gateway, made = fleet.gateway, fleet.replicas
            key = await gateway.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
            for one in made:  # each answers, also the one that did not publish it
                (known,) = [k for k in fleet.directory.all() if k.id == one.id]
                fleet.directory.choose = lambda *_, known=known: known
                for name in "ab":
                    answer = await gateway.chat(key, "hello", model=name, max_tokens=2)
                    assert answer.status_code == 200, answer.text
            await _downloads(gateway)
            for number in range(2):
                assert len(list((tmp_path / f"replica-{number}" / "blobs").iterdir())) == 2


async def _downloads(gateway: Site) -> None:
    """The gateway has none of the files, and hands out what was uploaded."""
    blobs = gateway.services.blobs.blobs
    assert not list(blobs.iterdir())
    for name, seed in (("a", 1), ("b", 2)):
        answer = await gateway.admin.get(f"/admin/v1/tenants/acme/adapters/{name}/versions/1/download")
        assert answer.status_code == 200, answer.text
        with tarfile.open(fileobj=BytesIO(answer.content)) as tar:
            weights = tar.extractfile(WEIGHTS_FILE)
            assert weights is not None
            assert weights.read() == (tiny.adapter(seed) / WEIGHTS_FILE).read_bytes()
    assert len(list(blobs.iterdir())) == 2
