"""A fleet on several machines: each process has its own data folder, the files are in an object store."""

from __future__ import annotations

import tarfile
from contextlib import AsyncExitStack
from io import BytesIO
from pathlib import Path

import pytest

from adapters.model import WEIGHTS_FILE
from server.app import create_app
from tests.support import tiny
from tests.support.fleet import FLEET_KEY, Fleet, replica
from tests.support.object_stores import KINDS, s3_server, url_of
from tests.support.site import Site, serving


@pytest.mark.parametrize("kind", KINDS)
async def test_each_process_has_its_own_data_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        shared = {
            "database_url": f"sqlite+aiosqlite:///{tmp_path / 'shared.db'}",
            "blobs_url": url_of(kind, s3, tmp_path),
        }
        async with AsyncExitStack() as stack:
            made = [
                await stack.enter_async_context(replica(tmp_path / f"replica-{number}", **shared))
                for number in range(2)
            ]
            settings = tiny.settings(tmp_path / "gateway", role="gateway", fleet_key=FLEET_KEY, **shared)
            gateway = await stack.enter_async_context(serving(create_app(settings)))
            fleet = Fleet(gateway, made)
            await fleet.all_known()
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
